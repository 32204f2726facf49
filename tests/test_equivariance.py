"""The equivariant network against every integer cyclic shift: random and real galaxies, random and trained weights, with the plain network beside it."""
from functools import cache
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from astroformer_astro.core import seed_everything
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.blocks import Polyphase
from astroformer_astro.models.equivariance import D4Average, d4_consistency, shift_consistency, stage_errors
from astroformer_astro.synth import synth_arrays

ngc = Path(__file__).parent.parent.parent/'shared'/'data'/'ngc_sdss'
variants = [dict(layout=l) for l in ('CCCT', 'CCTT', 'CCCB', 'CTTT', 'AAAT')] + [dict(rel_attn='post')]
name = lambda kw: '-'.join(kw.values())


def normalised(pictures):
    x = torch.as_tensor(np.stack(pictures)).permute(0, 3, 1, 2).double()
    return (x - x.mean((0, 2, 3), keepdim=True))/x.std((0, 2, 3), keepdim=True)


@cache
def images(kind, size, n=4):
    if kind == 'random': return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    if kind == 'synth': return normalised(list(synth_arrays(n, size, seed=3, balance='uniform')['images']))
    if not ngc.exists(): pytest.skip(f'real galaxies are not at {ngc}')
    files = pd.read_csv(ngc/'labels.csv').file.sample(n, random_state=0)
    return normalised([np.asarray(Image.open(ngc/f).convert('RGB').resize((size, size), Image.BOX)) for f in files])


@cache
def weights(variant, trained):
    "State of an equivariant network, fresh or after 12 steps on simulated galaxies"
    seed_everything(0)
    model = astroformer('astroformer_nano', equivariant=True, **dict(variant))
    if trained:
        a = synth_arrays(96, 64, seed=0, balance='uniform')
        x, y, opt = normalised(list(a['images'])).float(), torch.as_tensor(a['ans'].astype(int)), torch.optim.AdamW(model.parameters(), 3e-3)
        for rows in torch.arange(96).view(12, 8):
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step(); opt.zero_grad()
    return model.state_dict()


def network(variant={}, trained=True, equivariant=True, dtype=torch.float64):
    model = astroformer('astroformer_nano', equivariant=equivariant, **variant)
    model.load_state_dict(weights(tuple(variant.items()), trained))
    return model.to(dtype).eval()


def shifts(n, size, seed=0): return torch.randint(size, (n, 2), generator=torch.Generator().manual_seed(seed)).tolist()

def shifted(x, steps):
    "`x[i % len(x)]` by `steps[i]`"
    return torch.stack([x[i % len(x)].roll(tuple(s), (1, 2)) for i, s in enumerate(steps)])

def errors(model, x, n=64):
    "Relative error of the logits for `n` random shifts, the images taken in turn"
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad(): at_rest, moved = model(x), model(shifted(x, shifts(n, x.shape[-1])))
    at_rest = at_rest[torch.arange(n) % len(x)]
    return (moved - at_rest).norm(dim=1)/at_rest.norm(dim=1)


@pytest.mark.parametrize('kind', ['random', 'real'])
@pytest.mark.parametrize('size', [64, 96])
@pytest.mark.parametrize('trained', [False, True], ids=['fresh', 'trained'])
@pytest.mark.parametrize('variant', variants, ids=name)
def test_logits_do_not_notice_64_shifts(variant, trained, size, kind):
    n = 64 if variant in variants[:2] else 8                      # the rest need only be wired alike
    assert errors(network(variant, trained), images(kind, size), n).max() <= 1e-10


@pytest.mark.parametrize('kind', ['synth', 'real'])
def test_the_plain_network_does_notice(kind):
    x = images(kind, 64)
    assert errors(network(equivariant=False), x, 16).median() > 1e-3
    assert errors(network(trained=False, equivariant=False), x, 16).median() > 1e-4


@pytest.mark.parametrize('kind', ['random', 'synth', 'real'])
def test_single_precision(kind): assert errors(network(dtype=torch.float32), images(kind, 64)).max() <= 1e-5


@pytest.mark.parametrize('variant', variants[:2], ids=name)
@pytest.mark.parametrize('kind', ['random', 'synth', 'real'])
def test_maps_are_only_shifted_on_their_own_grids(kind, variant):
    x = images(kind, 64)
    exact, plain = network(variant), network(variant, equivariant=False)
    for step in (1, 0), (5, 11), (31, 62):
        assert max(stage_errors(exact, x, step).values()) <= 1e-10
        assert min(stage_errors(plain, x, step).values()) > 1e-3


class Undecided(nn.Module):
    "Logits beside their mean over some images: every class is in reach, and its border near"
    def __init__(self, model, x):
        super().__init__()
        self.model = model
        with torch.no_grad(): self.mean = model(x).mean(0)

    def forward(self, x): return self.model(x) - self.mean


@pytest.mark.parametrize('kind', ['synth', 'real'])
def test_every_class_survives_cyclic_shifts(kind):
    x = images(kind, 64, 12)
    exact, plain = (shift_consistency(Undecided(network(equivariant=e), x), x, 5, n=12) for e in (True, False))
    assert exact.worst == exact.mean == 1
    assert plain.worst <= plain.mean < 1


def test_attributions_move_with_the_galaxy():
    def attribution(model, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x)[:,1].sum(), x)[0]
    x = images('synth', 64)
    def error(model, step):
        at_rest = attribution(model, x).roll(step, (2, 3))
        return (attribution(model, x.roll(step, (2, 3))) - at_rest).norm()/at_rest.norm()
    assert max(error(network(), s) for s in ((1, 0), (7, 30), (32, 5))) <= 1e-10
    assert error(network(equivariant=False), (1, 0)) > .01


@pytest.mark.parametrize('equivariant', [False, True])
@pytest.mark.parametrize('kind', ['random', 'synth', 'real'])
def test_average_is_the_same_in_all_orientations(kind, equivariant):
    model, x = D4Average(network(equivariant=equivariant)), images(kind, 64)[:1]
    views = lambda x: [v.rot90(k, (2, 3)) for v in (x, x.flip(2)) for k in range(4)]
    spread = lambda seen: (seen - seen[:1]).norm(dim=1).max()/seen[0].norm()
    with torch.no_grad():
        assert spread(model(torch.cat(views(x)))) <= 1e-10
        assert spread(model.model(torch.cat(views(x)))) > 1e-4
        if kind == 'random': assert spread(torch.cat([model(v) for v in views(x[..., :48])])) <= 1e-10
    if equivariant: assert errors(model, x, 4).max() <= 1e-10


def test_orientations_are_counted():
    x = images('synth', 64)
    plain = Undecided(network(), x)
    assert d4_consistency(D4Average(plain), x).worst == 1 > d4_consistency(plain, x).worst


def test_ties_break_it():
    "A noiseless model galaxy, mirrored in itself: the documented limit"
    r2 = (torch.arange(64.).double() - 31.5)**2
    galaxy = torch.exp(-(r2[:,None] + r2)/18).expand(1, 3, 64, 64)
    noise = 1e-3*images('random', 64)[:1]
    assert errors(network(), galaxy, 32).max() > 1e-4
    assert errors(network(), galaxy + noise, 32).max() <= 1e-10


maps = st.builds(lambda h, w, c, seed: torch.randn(2, c, 2*h, 2*w, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
                 st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
steps = st.tuples(st.integers(-20, 20), st.integers(-20, 20))
rolls_of = lambda x: [x.roll((i, j), (1, 2)) for i in range(x.shape[1]) for j in range(x.shape[2])]


@settings(max_examples=60, deadline=None)
@given(maps, steps)
def test_polyphase_halves_a_shifted_map_to_the_shifted_half(x, step):
    half = lambda x: Polyphase()(x)[..., ::2, ::2]
    for a, b in zip(half(x), half(x.roll(step, (2, 3)))): assert any(torch.equal(b, r) for r in rolls_of(a))


@settings(max_examples=60, deadline=None)
@given(maps, st.floats(.01, 100))
def test_polyphase_is_a_roll_by_at_most_a_pixel(x, scale):
    y = Polyphase()(x)
    for a, b in zip(x, y): assert any(torch.equal(b, a.roll((-i, -j), (1, 2))) for i in (0, 1) for j in (0, 1))
    energy = y.square().unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 2, 4)).flatten(1)
    assert (energy[:,0] >= energy.max(1).values*(1 - 1e-12)).all()
    assert torch.equal(Polyphase()(y), y)                    # nothing is left to do
    assert torch.equal(Polyphase()(scale*x), scale*y)        # brightness does not choose
    assert torch.equal(Polyphase()(x[1:]), y[1:])            # nor do the neighbours in the batch
