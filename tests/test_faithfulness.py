"Explanations measured against networks whose right explanation is known"
import json
import numpy as np, pandas as pd, pytest, timm, torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.vision.data import ImageBlock
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from astroformer_astro.core import GalaxyDataError
from astroformer_astro.interpret.attribution import picture_logits, read_picture
from astroformer_astro.interpret.faithfulness import (centred_map, explanation_benchmark, light_map, map_infidelity, map_stability, method_scores, picture_map,
                                                      random_map, randomisation_curve, rank_correlation, rank_methods, removal_curve, removal_order, shuffled_networks)
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.equivariance import D4Average

torch.set_num_threads(1)
MEAN, STD = [.2, .3, .4], [.5, .4, .3]


class Corner(nn.Module):
    "Looks at the upper left quarter alone, where the galaxy is not"
    def __init__(self, size=16):
        super().__init__()
        w = torch.zeros(2, 3, size, size)
        w[0, :, :size//2, :size//2] = 2/size
        self.w = nn.Parameter(w)
    def forward(self, x): return torch.einsum('bchw,kchw->bk', x, self.w)


def learner(model, images):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock(vocab=['a', 'b'])), get_x=lambda i: Image.fromarray(images[i]) if isinstance(i, (int, np.integer)) else i,
                      get_y=lambda i: 'ab'[i % 2], splitter=lambda items: (list(items), list(items)), batch_tfms=Normalize.from_stats(MEAN, STD, cuda=False))
    return Learner(block.dataloaders(range(len(images)), bs=4, num_workers=0, device='cpu'), model, loss_func=nn.CrossEntropyLoss())


def pictures(n=6, size=16): return np.random.default_rng(0).integers(40, 256, (n, size, size, 3)).astype(np.uint8)


@pytest.fixture(scope='module')
def corner(): return learner(Corner(), pictures())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99))
def test_every_square_has_a_place_of_its_own(h, w, side, seed):
    places = removal_order(np.random.default_rng(seed).normal(size=(h, w)).round(1), side)
    assert places.shape == (h, w) and sorted(set(places.ravel())) == list(range(places.max() + 1))
    assert places.max() + 1 == -(-h//side)*-(-w//side)
    assert (places[:side, :side] == places[0, 0]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_no_order_beats_the_truth_of_a_sum(seed):
    "For a sum of positive parts, deletion in the order of the parts has the least area of all orders, insertion the most"
    g = torch.Generator().manual_seed(seed)
    w, x, none = torch.rand(1, 6, 6, generator=g), torch.rand(1, 6, 6, generator=g), torch.zeros(1, 6, 6)
    def area(m, kind): return removal_curve(lambda p: (p*w).sum((1, 2, 3))[:, None], x, m, 0, none, kind, steps=36).auc
    truth, other = (w*x)[0].numpy(), random_map(x, seed=seed)
    assert area(truth, 'deletion') <= area(other, 'deletion') + 1e-5
    assert area(truth, 'insertion') >= area(other, 'insertion') - 1e-5
    full = float((w*x).sum())
    assert abs(area(truth, 'deletion') + area(truth, 'insertion') - full) < 1e-4*full + 1e-5      # of a sum, what is gone and what is there make the whole


def test_ends_of_the_curves(corner):
    x, b = read_picture(corner, 0), torch.zeros(3, 16, 16)
    forward = lambda p: picture_logits(corner, p).softmax(1)
    for kind, (first, last) in dict(deletion=(x, b), insertion=(b, x)).items():
        c = removal_curve(forward, x, random_map(x), 0, b, kind, steps=7, bs=3)
        np.testing.assert_allclose(c.values[[0, -1]], forward(torch.stack([first, last]))[:, 0].detach(), rtol=1e-5)
        assert len(c.share) == len(c.values) == 8


def test_a_network_that_looks_at_the_corner(corner):
    "The truth is found, and the middle, which every galaxy is in, is no excuse"
    scores = method_scores(corner, range(4), baseline='black', checks=2, progress=False)
    table = rank_methods(scores)
    assert table.index[0] == 'integrated_gradients' and table.trusted['integrated_gradients']
    assert table.infidelity['integrated_gradients'] < 1e-4 < .3 < table.infidelity['centred Gaussian']
    assert table.deletion_1['centred Gaussian'] > table.deletion_1['integrated_gradients'] + .02
    assert set(scores.method) >= {'integrated_gradients', 'saliency', 'centred Gaussian', 'random', 'light'} and len(scores) == 4*scores.method.nunique()
    assert scores.randomised.notna().sum() == 2*(scores.method.nunique() - 3)


def test_nothing_is_left_changed(corner):
    model = corner.model.train()
    model.w.requires_grad_(False)
    before = model.w.clone()
    method_scores(corner, [0], ['saliency'], checks=1, progress=False)
    def breaks(learn, x, t): raise KeyError('crash')
    with pytest.raises(KeyError, match='crash'): method_scores(corner, [0], dict(breaks=breaks), progress=False)
    assert model.training and not model.w.requires_grad and (model.w == before).all() and corner.model is model
    model.eval().requires_grad_(True)


def test_time_is_up(corner): assert method_scores(corner, range(6), ['saliency'], checks=0, seconds=1e-9, progress=False).galaxy.max() == 0


def test_bad_requests(corner):
    with pytest.raises(GalaxyDataError, match="there is no method 'tea leaves'; choose from"): method_scores(corner, [0], ['tea leaves'], progress=False)
    with pytest.raises(GalaxyDataError, match='no galaxies'): method_scores(corner, [], progress=False)
    with pytest.raises(GalaxyDataError, match="no baseline 'tea'"): method_scores(corner, [0], baseline='tea', progress=False)
    with pytest.raises(GalaxyDataError, match="'deletion' or 'insertion'"): removal_curve(None, torch.zeros(1, 2, 2), np.zeros((2, 2)), 0, torch.zeros(1, 2, 2), 'undoing')
    with pytest.raises(GalaxyDataError, match='a map of 3 x 3 px does not belong to a picture of 2 x 2 px'): removal_curve(None, torch.zeros(1, 2, 2), np.zeros((3, 3)), 0, torch.zeros(1, 2, 2))


def test_the_verdict_is_said_and_written(corner, tmp_path, capsys):
    only_light = lambda learn, x, t: light_map(x, 0*x)
    table = explanation_benchmark(corner, range(3), default='light itself', methods={'light itself': only_light, 'truth': lambda learn, x, t: picture_map(learn, x, t, baseline='black')},
                                  baseline='black', checks=2, out=tmp_path/'e.json', progress=False)
    assert not table.trusted['light itself'] and table.randomised['light itself'] > .99
    assert 'light itself fails its checks here; truth passes them.' in capsys.readouterr().out
    found = json.loads((tmp_path/'e.json').read_text())
    assert found['table']['truth']['trusted'] is True and len(found['galaxies']) == 15 and found['settings']['baseline'] == 'black'


def test_shuffling_from_the_head_down():
    torch.manual_seed(0)
    model = astroformer('astroformer_nano', img_size=32, classes=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    steps = list(shuffled_networks(model))
    assert [n for n, _ in steps] == ['head', 'stages.3', 'stages.2', 'stages.1', 'stages.0', 'stem']
    changed = [{k.split('.')[0] + ('.' + k.split('.')[1] if k.startswith('stages') else '') for k, v in m.state_dict().items() if (v != before[k]).any()} for _, m in steps]
    assert [len(c) for c in changed] == [1, 2, 3, 4, 5, 6] and changed[0] == {'head'}
    assert all((v == before[k]).all() for k, v in model.state_dict().items())
    assert torch.isfinite(steps[-1][1].eval()(torch.rand(2, 3, 32, 32))).all()
    assert len(list(shuffled_networks(timm.create_model('resnet10t', num_classes=2)))) > 3


def test_explanations_of_equivariant_networks_move_with_the_galaxy():
    "Cyclic shifts by whole strides and by single pixels; and turns, of a network averaged over them"
    torch.manual_seed(0)
    y, x = torch.meshgrid(torch.arange(64.), torch.arange(64.), indexing='ij')
    galaxy = torch.exp(-((y - 30)**2/60 + (x - 33)**2/20))[None].expand(3, -1, -1)*.8 + .02*torch.rand(3, 64, 64)
    def moves(model, kind, **kwargs):
        learn = learner(model.eval(), pictures(4, 64))
        return map_stability(lambda p, t: picture_map(learn, p, t, 'saliency'), galaxy, 0, kind, **kwargs)
    shifts = dict(kind='shift', shifts=[(3, -5)], mode='grid-wrap')
    exact, plain = (astroformer('astroformer_nano', img_size=64, classes=2, equivariant=e) for e in (True, False))
    assert moves(exact, **shifts) > .99 > .9 > moves(plain, **shifts)
    assert moves(D4Average(plain), 'turn') > .99 > .9 > moves(plain, 'turn')


def test_infidelity_is_captums():
    from captum.metrics import infidelity
    from astroformer_astro.interpret.faithfulness import _random_squares
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4*36, 2)), torch.rand(2, 8, 8)
    m, squares = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), _random_squares((8, 8), 20, 2, 5)
    def replace(inputs): return squares.expand(-1, 2, -1, -1), torch.where(squares > 0, torch.zeros(()), inputs)
    values = torch.tensor(m).expand(2, -1, -1)[None]/2
    theirs = infidelity(net, replace, x[None], values, target=1, n_perturb_samples=20, normalize=True).item()
    with torch.no_grad(): lost = net(x[None])[0, 1] - net(torch.where(squares > 0, torch.zeros(()), x))[:, 1]
    foretold = (torch.tensor(m)*squares[:, 0]).sum((1, 2))
    beta = (foretold*lost).mean()/(foretold**2).mean()
    by_hand = ((beta*foretold - lost)**2).mean()/(lost**2).mean()
    ours = map_infidelity(net, x, m, 1, torch.zeros(2, 8, 8), n=20, side=2, seed=5)
    assert ours == pytest.approx(by_hand.item(), rel=1e-3) == theirs/(lost**2).mean().item()


def test_forgetting_shows(corner):
    x = [read_picture(corner, i) for i in range(3)]
    curve = randomisation_curve(corner, x, 'integrated_gradients', 'black')
    assert curve.correlation[0] == 1 and abs(curve.correlation.iloc[-1]) < .3
    assert rank_correlation(centred_map(x[0]), np.rot90(centred_map(x[0]))) > .999
