"Attribution and attention against answers known beforehand; nothing left behind after an error"
import numpy as np, pytest, torch
from captum.attr import IntegratedGradients
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock
from fastai.learner import Learner
from fastai.vision.data import ImageBlock
from fastai.data.transforms import Normalize
from astroformer_astro.core import GalaxyDataError
from astroformer_astro.interpret.attention import AttentionMaps, attention_maps, frozen, record_attention, token_at, token_side
from astroformer_astro.interpret.attribution import (Attribution, Explainer, integrated_gradients, picture_logits, predicted_classes, read_picture,
                                                     saliency, sky_baseline)
from astroformer_astro.interpret.plot import plot_attention, plot_attribution, plot_explanation, to_png
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.attention import RelativeAttention

torch.set_num_threads(1)
MEAN, STD = [.2, .3, .4], [.5, .4, .3]


class Linear(nn.Module):
    "Logits `w . x` over all pixels: the attribution of a pixel is its weight times its distance from the baseline"
    def __init__(self, size=8, classes=3):
        super().__init__()
        self.w = nn.Parameter(torch.arange(classes*3*size*size, dtype=torch.float32).reshape(classes, -1).sin())
        self.drop = nn.Dropout()
    def forward(self, x): return self.drop(x).flatten(1) @ self.w.T


def pictures(n=12, size=8): return np.random.default_rng(0).integers(0, 256, (n, size, size, 3)).astype(np.uint8)


def learner(model, images, classes=('a', 'b', 'c')):
    "A plain fastai learner of arrays, standardised by fastai's own `Normalize`"
    block = DataBlock(blocks=(ImageBlock, CategoryBlock(vocab=list(classes))), get_x=lambda i: Image.fromarray(images[i]) if isinstance(i, (int, np.integer)) else i,
                      get_y=lambda i: classes[i % len(classes)], splitter=lambda items: (list(items), list(items)), batch_tfms=Normalize.from_stats(MEAN, STD, cuda=False))
    return Learner(block.dataloaders(range(len(images)), bs=4, num_workers=0, device='cpu'), model, loss_func=nn.CrossEntropyLoss())


@pytest.fixture(scope='module')
def astro():
    torch.manual_seed(0)
    images = pictures(6, 64)
    return learner(astroformer('astroformer_nano', img_size=64, classes=3), images), images


def test_linear_by_hand():
    images = pictures()
    learn = learner(Linear(), images)
    a = Explainer(learn).attribute(2, baseline='black', target='b')
    x = images[2].transpose(2, 0, 1)/255.
    expected = learn.model.w[1].detach().numpy().reshape(3, 8, 8)*x/np.array(STD)[:, None, None]
    np.testing.assert_allclose(a.values, expected, atol=1e-5)
    np.testing.assert_allclose(a.heatmap(), expected.sum(0), atol=1e-5)
    np.testing.assert_allclose(a.image, images[2]/255., atol=1e-6)
    assert a.delta < 1e-4 and (a.target, a.baseline, a.method) == ('b', 'black', 'integrated_gradients')


def test_relu_sum_by_hand():
    "F = relu(x1 + x2 - 1) from (0, 0) to (1, 2): slopes of one over the last two thirds of the path"
    values, delta = integrated_gradients(lambda x: (x.sum((1, 2, 3)) - 1).relu()[:, None], torch.tensor([[[[1., 2.]]]]), torch.zeros(1, 1, 1, 2), 0)
    np.testing.assert_allclose(values.numpy(), [[[[2/3, 4/3]]]], atol=.01)
    assert delta < .01


def test_steps_are_doubled_until_the_error_is_small():
    kink = lambda x: (x.sum((1, 2, 3)) - 1).relu()[:, None]
    x = torch.full((1, 1, 1, 2), 1.5)
    deltas = [integrated_gradients(kink, x, 0*x, 0, steps=3, max_steps=m)[1] for m in (3, 400)]
    assert deltas[0] > .02 and deltas[1] < .01


def test_equals_captum_by_hand(astro):
    learn, images = astro
    a = Explainer(learn).attribute(1, steps=20)
    mean, std = (torch.tensor(s)[:, None, None] for s in (MEAN, STD))
    x = torch.from_numpy(images[1]).permute(2, 0, 1)/255
    x, b = (x - mean)/std, (sky_baseline(x) - mean)/std
    model = learn.model.eval()
    by_hand = IntegratedGradients(model).attribute(x[None], b[None], learn.dls.vocab.o2i[a.target], n_steps=20)
    np.testing.assert_allclose(a.values, by_hand[0].detach().numpy(), atol=1e-6)


def test_chunks_do_not_change_the_answer(astro):
    learn, _ = astro
    x, sizes = read_picture(learn, 0)[None].repeat(1, 1, 4, 4), []
    def forward(images): sizes.append(len(images)); return picture_logits(learn, images)
    with frozen(learn.model):
        small = integrated_gradients(forward, x, 0*x, 0, steps=7, max_steps=7)[0]
        whole = IntegratedGradients(lambda i: picture_logits(learn, i)).attribute(x, 0*x, 0, n_steps=7)
    assert max(sizes) == 4
    np.testing.assert_allclose(small.detach().numpy(), whole.detach().numpy(), atol=1e-6)


def test_saliency_is_the_gradient():
    learn = learner(Linear(), pictures())
    expected = learn.model.w[0].detach().reshape(1, 3, 8, 8).abs()
    with frozen(learn.model): values, delta = saliency(learn.model, torch.rand(1, 3, 8, 8), None, 0)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert delta is None


def test_items_of_every_kind(astro, tmp_path):
    learn, images = astro
    ex = Explainer(learn)
    Image.fromarray(images[3]).save(tmp_path/'g.png')
    for item in (np.int64(3), Image.fromarray(images[3]), images[3], tmp_path/'g.png', str(tmp_path/'g.png')):
        assert ex.predict(item).probabilities == pytest.approx(ex.predict(3).probabilities, abs=1e-5)


def test_predictions_agree_with_the_learner(astro):
    learn, images = astro
    p, _ = learn.get_preds(dl=learn.dls.test_dl(list(range(6)), num_workers=0), act=lambda x: x.softmax(1))
    assert predicted_classes(learn, range(6)) == [learn.dls.vocab[i] for i in p.argmax(1)]
    np.testing.assert_allclose(list(Explainer(learn).predict(4).probabilities.values()), p[4], atol=1e-5)


@pytest.mark.parametrize('item', [999, 'missing.png', None, 3.5, ['x'], np.zeros((3, 3, 3, 3))])
def test_unreadable_items(astro, item):
    with pytest.raises(GalaxyDataError, match='cannot be read|does not exist'): Explainer(astro[0]).attribute(item)


@pytest.mark.parametrize('asked, found', [(dict(method='x'), 'no method'), (dict(baseline='x'), 'no baseline'), (dict(target='x'), 'no class')])
def test_unknown_names(astro, asked, found):
    with pytest.raises(GalaxyDataError, match=f"{found} 'x'; choose from"): Explainer(astro[0]).attribute(0, **asked)


def test_no_attention():
    with pytest.raises(GalaxyDataError, match='Linear has no attention'): Explainer(learner(Linear(), pictures())).attention(0)


def flags(model): return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], [p.grad is None for p in model.parameters()]
def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize('ask', [lambda e: e.attribute(0, steps=4), lambda e: e.attribute(0, 'saliency'), lambda e: e.attention(0), lambda e: e.predict(0)])
def test_the_network_is_left_as_it_was(astro, ask):
    learn, _ = astro
    learn.model.train(); learn.model.stem.eval(); learn.model.stages[0].requires_grad_(False)
    before, weights = flags(learn.model), {k: v.clone() for k, v in learn.model.state_dict().items()}
    ask(Explainer(learn))
    assert flags(learn.model) == before and hooks(learn.model) == 0
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())
    learn.model.requires_grad_(True)


@pytest.mark.parametrize('ask', [lambda e: e.attribute(0), lambda e: e.attention(0)])
def test_the_network_is_left_as_it_was_after_a_crash(monkeypatch, astro, ask):
    learn, _ = astro
    learn.model.train()
    before = flags(learn.model)
    def crash(x): raise RuntimeError('crash')
    monkeypatch.setattr(learn.model.head, 'forward', crash)
    with pytest.raises(RuntimeError, match='crash'): ask(Explainer(learn))
    assert flags(learn.model) == before and hooks(learn.model) == 0


def test_works_where_gradients_are_switched_off(astro):
    with torch.no_grad(): assert np.abs(Explainer(astro[0]).attribute(0, steps=4).values).max() > 0


def test_rows_sum_to_one_on_any_map():
    model = astroformer('astroformer_nano', img_size=64, layout='CCTT', depths=(1, 1, 2, 1), strides=(2, 2, 2, 2))
    maps = attention_maps(model, torch.randn(1, 3, 69, 100))
    assert maps.grids == [(5, 7), (5, 7), (3, 4)]
    for block, grid in enumerate(maps.grids):
        for head in (None, 0, 1):
            np.testing.assert_allclose(maps.matrix(block, head).sum(-1), 1, atol=1e-5)
            assert maps.average(block, head).sum() == pytest.approx(1, abs=1e-5)
        assert maps.upsampled(maps.average(block)).shape == (69, 100)


@pytest.mark.parametrize('h, w', [(64, 64), (69, 48), (33, 100)])
def test_pixel_to_token_agrees_with_the_network(h, w):
    "Light in one token's square changes what that token's pooled shortcut sees, and no other"
    x = torch.zeros(1, 1, h, w)
    pool = nn.Sequential(*[nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) for _ in range(4)])
    grid = tuple(pool(x).shape[-2:])
    maps = AttentionMaps([np.full((1, grid[0]*grid[1], grid[0]*grid[1]), 1/(grid[0]*grid[1]))], [grid], (h, w))
    for y, c in [(0, 0), (15, 16), (h - 1, w - 1), (h//2, w//3)]:
        x.zero_(); x[..., y, c] = 1
        lit = np.unravel_index(pool(x)[0, 0].argmax().item(), grid)
        assert token_at((h, w), grid, y, c) == lit
        assert maps.upsampled(np.arange(grid[0]*grid[1]).reshape(grid))[y, c] == lit[0]*grid[1] + lit[1]
    assert token_side((h, w), grid) == (16, 16)


def test_known_attention():
    "Zero queries and a bias with its peak one token down: every query looks one token down"
    layer = RelativeAttention(3, 32, size=(4, 6))
    dy, dx = np.mgrid[-3:4, -5:6]
    with torch.no_grad():
        for p in layer.qkv.parameters(): p.zero_()
        layer.rel_pos.bias[:] = torch.tensor(-9.*((dy + 1)**2 + dx**2)).float().flatten()[:, None]
    maps = attention_maps(nn.Sequential(nn.AvgPool2d(8), layer), torch.rand(1, 3, 32, 48))
    for y, x in (0, 0), (9, 30), (23, 47): assert np.unravel_index(maps.query(y, x).argmax(), (4, 6)) == (y//8 + 1, x//8)


def test_recording_of_a_batch():
    model = astroformer('astroformer_nano', img_size=64)
    with record_attention(model) as seen:
        for n in (2, 3): model(torch.randn(n, 3, 64, 64))
    assert [a.shape[0] for a, _ in seen] == [2, 3] and not any(a.requires_grad for a, _ in seen)
    model(torch.randn(1, 3, 64, 64))
    assert len(seen) == 2


@pytest.mark.parametrize('values', [np.zeros((3, 16, 16)), np.full((3, 16, 16), .1), np.eye(16)[None].repeat(3, 0)])
@pytest.mark.filterwarnings('error')
def test_every_map_can_be_drawn(values):
    a = Attribution(np.full((16, 16, 3), .5), {f'a class with a very long name, number {i}': 1/30 for i in range(30)}, values=values, target='x', method='integrated_gradients',
                    baseline='sky', delta=.5)
    maps = AttentionMaps([np.full((2, 4, 4), .25)], [(2, 2)], (16, 16))
    for fig in (plot_attribution(a), plot_explanation(a), plot_explanation(a, maps, (3, 3)), plot_explanation(a, maps, vmax=1), plot_attention(maps, a.image, by='head')):
        assert to_png(fig, dpi=40).startswith(b'\x89PNG')
    assert plt.get_fignums() == []
