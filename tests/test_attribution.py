"Attribution, attention and ablation of any network: equal to Captum by hand, within memory, and nothing left behind"
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, timm, torch
from captum import attr
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.vision.data import ImageBlock
from astroformer_astro.calibration import Scaling, use_scaling
from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.images import GalaxySet
from astroformer_astro.interpret.ablation import ablate
from astroformer_astro.interpret.attention import attention_maps, attention_relevance, frozen, record_attention
from astroformer_astro.interpret.attribution import Explainer, Question, attribution_baselines, attribution_methods, fit_memory, integrated_gradients, predicted_classes, valid_methods
from astroformer_astro.interpret.shape import GalaxyShape, galaxy_shape, neighbour_mask
from astroformer_astro.learner import astroformer_learner, load_astroformer_learner
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.checkpoint import save_astroformer

shared = Path(__file__).parents[2]/'shared'/'data'
torch.set_num_threads(1)
MEAN, STD = [.2, .3, .4], [.5, .4, .3]


def galaxies(n=6, size=64):
    "Discs of random tilt on a noisy sky"
    rng = np.random.default_rng(0)
    shapes = [GalaxyShape(size/2, size/2, size/8, .4 + .5*rng.random(), 180*rng.random()) for _ in range(n)]
    light = np.stack([np.exp(-1.68*s.radius_map((size, size)))[..., None]*rng.uniform(.5, 1, 3) for s in shapes])
    return (255*(light*.8 + .1 + rng.normal(0, .01, light.shape)).clip(0, 1)).astype(np.uint8)


def learner(model, images, classes=('a', 'b', 'c'), valid=True):
    block = DataBlock(blocks=(ImageBlock, CategoryBlock(vocab=list(classes))), get_x=lambda i: Image.fromarray(images[i]) if isinstance(i, (int, np.integer)) else i,
                      get_y=lambda i: classes[i % len(classes)], splitter=lambda items: (list(items), list(items) if valid else []), batch_tfms=Normalize.from_stats(MEAN, STD, cuda=False))
    return Learner(block.dataloaders(range(len(images)), bs=4, num_workers=0, device='cpu'), model, loss_func=nn.CrossEntropyLoss())


@pytest.fixture(scope='module')
def astro():
    torch.manual_seed(0)
    return learner(astroformer('astroformer_nano', img_size=64, classes=3), galaxies())


@pytest.fixture(scope='module')
def resnet():
    torch.manual_seed(0)
    return learner(timm.create_model('resnet10t', num_classes=3), galaxies())


class Prepared(nn.Module):
    "The network behind its standardising, as somebody with Captum alone would write it"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model((x - torch.tensor(MEAN)[:, None, None])/torch.tensor(STD)[:, None, None])


def picture(learn, row): return torch.from_numpy(np.array(learn.dls.train_ds[row][0])).permute(2, 0, 1).float()/255
def state(m): return [c.training for c in m.modules()], [p.requires_grad for p in m.parameters()], [p.grad is None for p in m.parameters()]
def hooks(m): return sum(len(h) for c in m.modules() for h in (c._forward_hooks, c._forward_pre_hooks, c._backward_hooks, c._backward_pre_hooks))


BY_HAND = dict(
    saliency=lambda n, x, b, t: attr.Saliency(n).attribute(x.clone().requires_grad_(), t),
    input_x_gradient=lambda n, x, b, t: attr.InputXGradient(n).attribute(x.clone().requires_grad_(), t),
    integrated_gradients=lambda n, x, b, t: attr.IntegratedGradients(n).attribute(x, b, t, n_steps=400),
    occlusion=lambda n, x, b, t: attr.Occlusion(n).attribute(x, (3, 8, 8), (3, 4, 4), b, t)[:, :1],
    grad_cam=lambda n, x, b, t: attr.LayerGradCam(n, n.model.stages[-1] if hasattr(n.model, 'stages') else n.model.layer4).attribute(
        x.clone().requires_grad_(), t, relu_attributions=True).repeat_interleave(16 if hasattr(n.model, 'stages') else 32, 2).repeat_interleave(16 if hasattr(n.model, 'stages') else 32, 3),
    guided_backprop=lambda n, x, b, t: attr.GuidedBackprop(n).attribute(x.clone().requires_grad_(), t))


@pytest.mark.parametrize('which, method', [('astro', m) for m in list(BY_HAND)[:5]] + [('resnet', 'grad_cam'), ('resnet', 'guided_backprop')])
@pytest.mark.filterwarnings('ignore:Setting backward hooks')
def test_equals_captum_by_hand(request, which, method):
    learn = request.getfixturevalue(which)
    how = dict(steps=400) if method == 'integrated_gradients' else {}
    a = Explainer(learn).attribute(1, method, target='b', **how)
    x = picture(learn, 1)[None]
    hand = BY_HAND[method](Prepared(learn.model.eval()), x, attribution_baselines['sky'](x[0])[None], 1)
    np.testing.assert_allclose(a.values, hand[0].detach().numpy(), atol=1e-6*max(1, hand.abs().max().item()))


@pytest.mark.parametrize('which', ['astro', 'resnet'])
def test_every_method_on_every_kind_of_network(request, which):
    "Arrays of the right shape, the network as it was, nobody's random numbers touched"
    learn = request.getfixturevalue(which)
    learn.model.train(); learn.model.requires_grad_(True)
    before, weights, ex = state(learn.model), {k: v.clone() for k, v in learn.model.state_dict().items()}, Explainer(learn)
    torch.manual_seed(5); np.random.seed(5); drawn = torch.rand(1), np.random.rand()
    for method in valid_methods(learn.model):
        torch.manual_seed(5); np.random.seed(5)
        a = ex.attribute(picture(learn, 2), method, target='b', against='a', steps=8)
        assert (torch.rand(1), np.random.rand()) == drawn
        assert a.values.shape[1:] == (64, 64) and a.values.shape[0] in (1, 3) and np.isfinite(a.values).all() and a.seconds > 0 and a.pictures >= 1, method
        assert state(learn.model) == before and hooks(learn.model) == 0, method
    assert all(torch.equal(v, weights[k]) for k, v in learn.model.state_dict().items())


@pytest.mark.parametrize('baseline', [*attribution_baselines, np.zeros((3, 64, 64), np.float32)])
def test_every_baseline(astro, baseline):
    a = Explainer(astro).attribute(0, baseline=baseline, steps=100)
    assert a.reference.shape == (3, 64, 64) and a.delta < .05
    assert a.baseline == (baseline if isinstance(baseline, str) else 'own')


def test_a_network_of_timms_in_our_learner():
    rows = galaxies(8)
    table = pd.DataFrame(dict(label=['a', 'b']*4))
    learn = astroformer_learner(GalaxyDataLoaders.from_galaxies(GalaxySet(rows, table, ('a', 'b'), 'made'), bs=4, valid_pct=.5, device='cpu'), 'resnet18')
    ex = Explainer(learn)
    assert ex.stages(0) == ['act1', 'layer1', 'layer2', 'layer3', 'layer4']
    for how in dict(method='grad_cam', stage='layer2'), dict(method='guided_backprop'), dict(method='saliency', baseline='class_mean'): assert ex.attribute(0, **how).values.any()


def test_a_contrast_is_the_difference_of_two_maps(astro):
    ex = Explainer(astro)
    why, b, c = ex.attribute(0, target='b', against='c', steps=100), ex.attribute(0, target='b', steps=100), ex.attribute(0, target='c', steps=100)
    np.testing.assert_allclose(why.values, b.values - c.values, atol=1e-5)
    assert (why.target, why.against) == ('b', 'c')


def test_steps_rise_until_the_error_is_small(astro):
    for row in range(6): assert Explainer(astro).attribute(row, steps=5).delta < .01


@pytest.mark.skipif(not shared.exists(), reason='the real galaxies are not here')
def test_completeness_on_real_galaxies_after_training():
    table = pd.read_csv(shared/'ngc_sdss'/'labels.csv').groupby('coarse4').sample(30, random_state=0).reset_index(drop=True)
    torch.manual_seed(0)
    learn = astroformer_learner(GalaxyDataLoaders.from_catalog(table, images=shared/'ngc_sdss', y='coarse4', bs=24, device='cpu', progress=False), 'astroformer_nano', drop_path=0., lr=5e-3)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit_one_cycle(4)
    maps = [Explainer(learn).attribute(i) for i in list(learn.dls.valid_ds.items)[:8]]
    assert max(a.delta for a in maps) < .01 and max(a.pictures for a in maps) <= 50 + 100 + 200 + 400 + 8


class Hungry(nn.Module):
    "A network for which memory suffices for a few pictures only"
    def __init__(self, room, said): super().__init__(); self.w, self.room, self.said, self.sizes = nn.Parameter(torch.ones(3)), room, said, []
    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room: raise self.said
        return x.mean((2, 3))*self.w


@pytest.mark.parametrize('said', [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), torch.OutOfMemoryError('CUDA out of memory.'), MemoryError()])
@pytest.mark.parametrize('method', ['integrated_gradients', 'gradient_shap', 'smoothgrad', 'occlusion', 'feature_ablation'])
def test_memory_is_found_out(said, method):
    learn = learner(Hungry(5, said), galaxies())
    ex = Explainer(learn)
    a = ex.attribute(0, method, target='a', steps=30, seed=1)
    assert max(s for s in learn.model.sizes if s <= 5) == 4 and list(ex.batches.values()) == [4]
    learn.model.sizes.clear()
    ex.attribute(0, method, target='a', steps=30)
    assert max(learn.model.sizes) <= 4              # what fitted is remembered
    learn.model.room = 100
    whole = Explainer(learn).attribute(0, method, target='a', steps=30, seed=1)
    np.testing.assert_allclose(a.values, whole.values, atol=1e-5 if method not in ('gradient_shap', 'smoothgrad') else .01)


def test_memory_that_never_suffices():
    learn = learner(Hungry(100, RuntimeError('out of memory')), galaxies())
    ex = Explainer(learn)
    ex.predict(0)
    with pytest.raises(GalaxyDataError, match='does not suffice for one picture'): fit_memory(lambda n: learn.model(torch.zeros(200, 3, 8, 8)), 8)


def test_many_steps_in_small_chunks():
    learn = learner(Hungry(64, RuntimeError('out of memory')), galaxies())
    Explainer(learn).attribute(0, steps=1500, target='b')
    assert max(learn.model.sizes) <= 64 and sum(learn.model.sizes) >= 1500


class Stopped(Exception): pass

@pytest.mark.parametrize('method', list(attribution_methods))
def test_it_can_be_watched_and_stopped(resnet, method):
    ex, said = Explainer(resnet), []
    resnet.model.train()
    before = state(resnet.model)
    def stop(done, total):
        said.append((done, total))
        if len(said) > 1 or total <= 1: raise Stopped
    ex.batches[1, 3, 64, 64] = 4
    with pytest.raises(Stopped): ex.attribute(0, method, steps=20, progress=stop)
    assert said[0][0] == 0 and all(d <= t for d, t in said)
    assert state(resnet.model) == before and hooks(resnet.model) == 0


def test_progress_arrives(astro):
    for method in ('integrated_gradients', 'gradient_shap', 'smoothgrad', 'occlusion', 'feature_ablation'):
        said = []
        a = Explainer(astro).attribute(0, method, steps=400, window=16, progress=lambda *n: said.append(n))
        assert a.pictures == said[-1][1], method        # no more and no fewer than announced


@pytest.mark.parametrize('method', list(attribution_methods))
def test_the_network_is_left_as_it_was_after_a_crash(monkeypatch, resnet, method):
    resnet.model.train(); resnet.model.layer1.requires_grad_(False)
    before, calls = state(resnet.model), []
    forward = resnet.model.fc.forward
    def crash(x):
        calls.append(1)
        if len(calls) > 1: raise KeyError('crash')
        return forward(x)
    monkeypatch.setattr(resnet.model.fc, 'forward', crash)
    with pytest.raises(KeyError): Explainer(resnet).attribute(0, method)
    assert state(resnet.model) == before and hooks(resnet.model) == 0
    resnet.model.requires_grad_(True)


def test_folded_copy_follows_the_weights(astro):
    "A weight that is changed behind PyTorch's back, and one that is only put in another place"
    ex = Explainer(astro)
    first = ex.attribute(0, target='a', steps=100).values
    saved = {k: v.clone() for k, v in astro.model.state_dict().items()}
    for change in (lambda w: w.data.mul_(2), lambda w: w.data.copy_(w.data.flip(0))):
        change(astro.model.head.fc.weight)
        a = ex.attribute(0, target='a', steps=100)
        np.testing.assert_allclose(a.values, Explainer(astro).attribute(0, target='a', steps=100).values, atol=1e-7)
        assert np.abs(a.values - first).max() > 1e-5
        astro.model.load_state_dict(saved)


@pytest.mark.parametrize('off', [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(astro, off):
    expected = Explainer(astro).attribute(0, 'saliency').values
    with off(): got = Explainer(astro).attribute(picture(astro, 0), 'saliency').values
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_weights_without_gradients_get_a_sentence():
    with torch.inference_mode(): model = astroformer('astroformer_nano', img_size=64, classes=3)
    with pytest.raises(GalaxyDataError, match='made under torch.inference_mode and give no gradients'): Explainer(learner(model, galaxies())).attribute(0)


def test_a_network_under_no_grad_gets_a_sentence():
    class Shut(Hungry):
        @torch.no_grad()
        def forward(self, x): return super().forward(x)
    learn = learner(Shut(100, None), galaxies())
    with pytest.raises(GalaxyDataError, match='Shut gives no gradients, and this method needs them; use occlusion'): Explainer(learn).attribute(0, 'saliency')
    assert Explainer(learn).attribute(0, 'occlusion').values.any()


@pytest.mark.parametrize('x, found', [(torch.zeros(5, 64, 64), '5 x 64 x 64 is no picture for this network; expected 3 x 64 x 64'), (torch.zeros(3, 32, 32), '3 x 32 x 32'),
                                      (torch.zeros(3, 64, 64, dtype=torch.uint8), 'torch.uint8'), (torch.full((3, 64, 64), torch.nan), '12288 pixels of this picture are no numbers')])
def test_tensors_that_do_not_fit(astro, x, found):
    for ask in (Explainer(astro).attribute, Explainer(astro).predict, Explainer(astro).attention):
        with pytest.raises(GalaxyDataError, match=found): ask(x)


@pytest.mark.parametrize('how, found', [(dict(target='x'), "no class 'x'; choose from a, b, c"), (dict(target='a', against='x'), "no class 'x'"), (dict(target='a', against='a'), 'contrasted with itself'),
    (dict(baseline=np.zeros((3, 8, 8))), 'a picture of 3 x 64 x 64, not 3 x 8 x 8'), (dict(method='grad_cam', stage='x'), "no stage 'x'; choose from stem, stage1, stage2, stage3, stage4"),
    (dict(method='feature_ablation', features=np.zeros((8, 8), int)), 'labels of 64 x 64 pixels'), (dict(method='guided_backprop'), 'for networks of ReLU alone')])
def test_wrong_questions_get_a_sentence(astro, how, found):
    with pytest.raises(GalaxyDataError, match=found): Explainer(astro).attribute(0, **how)


def test_no_stages_and_no_attention():
    learn = learner(Hungry(100, None), galaxies())
    with pytest.raises(GalaxyDataError, match='has no stage with maps'): Explainer(learn).attribute(0, 'grad_cam')
    for ask in (Explainer(learn).attention, Explainer(learn).relevance):
        with pytest.raises(GalaxyDataError, match='Hungry has no attention to look at'): ask(0)


def test_an_empty_validation_set():
    learn = learner(astroformer('astroformer_nano', img_size=64, classes=3), galaxies(), valid=False)
    assert predicted_classes(learn, learn.dls.valid_ds.items) == []
    assert Explainer(learn).attribute(picture(learn, 0), 'saliency').values.any()
    with pytest.raises(GalaxyDataError, match="no galaxy of class 'd' to take the mean of"):
        from astroformer_astro.interpret.attribution import class_pictures
        class_pictures(learn, 'd')


def test_attribution_shifts_with_the_galaxy():
    "The equivariant variant, on a torus: the map of the shifted galaxy is the shifted map"
    torch.manual_seed(0)
    learn = learner(astroformer('astroformer_nano', img_size=64, classes=3, equivariant=True), galaxies())
    ex, x = Explainer(learn), picture(learn, 3)
    for shift, method in ((1, 0), 'saliency'), ((16, 32), 'saliency'), ((5, -3), 'integrated_gradients'):
        a, b = (ex.attribute(v, method, target='b', baseline='black', steps=50) for v in (x, x.roll(shift, (1, 2))))
        np.testing.assert_allclose(b.values, np.roll(a.values, shift, (1, 2)), atol=2e-4*np.abs(a.values).max(), err_msg=f'{method} {shift}')


@settings(max_examples=15, deadline=None)
@given(h=st.integers(32, 90), w=st.integers(32, 90), seed=st.integers(0, 99))
def test_attention_of_any_size(h, w, seed):
    torch.manual_seed(seed)
    model = astroformer('astroformer_nano', img_size=64, layout='CCTT', depths=(1, 1, 2, 2), strides=(2, 2, 2, 1))
    maps = attention_maps(model, torch.randn(1, 3, h, w))
    for block in range(len(maps.maps)):
        for m in (maps.rollout(block), *(maps.matrix(block, head, part) for head in (None, 0) for part in (None, 'content', 'position'))):
            np.testing.assert_allclose(m.sum(-1), 1, atol=1e-5); assert (m >= 0).all()
        assert maps.rolled(h - 1, w - 1, block).sum() == pytest.approx(1, abs=1e-5)
    r = attention_relevance(model, torch.randn(1, 3, h, w), 2, 1)
    assert r.shape == maps.grids[-1] and r.min() >= 0 and r.sum() == pytest.approx(1, abs=1e-5) and hooks(model) == 0


@pytest.mark.parametrize('form', ['pre', 'post'])
def test_relevance_is_gradient_times_attention(form):
    "One block: the positive part of gradient times attention, by hand"
    torch.manual_seed(0)
    model = astroformer('astroformer_nano', img_size=64, rel_attn=form).eval()
    x = torch.randn(1, 3, 64, 64)
    with record_attention(model, graph=True) as seen:
        slope = torch.autograd.grad(model(x)[0, 3], seen[0][0])[0]
        expected = (slope*seen[0][0])[0].clamp(min=0).mean(0).mean(0).reshape(4, 4).detach().numpy()
    np.testing.assert_allclose(attention_relevance(model, x, 3), expected/expected.sum(), atol=1e-6)
    maps = attention_maps(model, x)
    if form == 'post':
        with pytest.raises(GalaxyDataError, match='does not tell its position apart'): maps.average(part='position')
        np.testing.assert_allclose(maps.matrix(part='content'), maps.matrix(), atol=1e-5)


def test_relevance_leaves_no_hook_after_a_crash(monkeypatch, astro):
    def crash(x): raise KeyError('crash')
    monkeypatch.setattr(astro.model.head, 'forward', crash)
    before = state(astro.model)
    for ask in (lambda: attention_relevance(astro.model, torch.zeros(1, 3, 64, 64), 0), lambda: attention_maps(astro.model, torch.zeros(1, 3, 64, 64))):
        with pytest.raises(KeyError): ask()
        assert hooks(astro.model) == 0 and state(astro.model) == before


@settings(max_examples=25, deadline=None)
@given(radius=st.floats(5, 9), ratio=st.floats(.35, .95), angle=st.floats(0, 180), dy=st.floats(-3, 3), dx=st.floats(-3, 3), seed=st.integers(0, 99))
def test_shape_of_a_known_disc(radius, ratio, angle, dy, dx, seed):
    truth = GalaxyShape(31.5 + dy, 31.5 + dx, radius, ratio, angle)
    light = np.exp(-1.68*truth.radius_map((64, 64)))
    image = light[None] + np.random.default_rng(seed).normal(0, .005, (3, 64, 64)) + .1
    s = galaxy_shape(image)
    assert abs(s.y - truth.y) < .4 and abs(s.x - truth.x) < .4 and abs(s.radius/radius - 1) < .2 and abs(s.ratio - ratio) < .08
    if ratio < .8: assert abs((s.angle - angle + 90) % 180 - 90) < 6
    turned = galaxy_shape(np.rot90(image, 1, (1, 2)))              # counter-clockwise, as position angles run
    assert abs((turned.angle - s.angle - 90 + 90) % 180 - 90) < 1e-3 or s.ratio > .95
    assert turned.radius == pytest.approx(s.radius, rel=.01)


@pytest.mark.parametrize('image', [np.zeros((3, 64, 64)), np.ones((1, 40, 64)), np.random.default_rng(0).normal(.1, .03, (3, 64, 64))])
def test_no_galaxy_gets_a_sentence(image):
    for ask in (galaxy_shape, neighbour_mask):
        with pytest.raises(GalaxyDataError, match='no galaxy stands out of the sky'): ask(image)


def test_neighbours_without_photutils(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'photutils.segmentation', None)
    with pytest.raises(ImportError, match=r"astroformer_astro\[interpret\]"): neighbour_mask(galaxies(1)[0].transpose(2, 0, 1)/255)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_ablation_is_what_the_network_says_of_the_picture_without_it(astro, seed):
    mask = np.random.default_rng(seed).random((64, 64)) < .3
    a = ablate(Explainer(astro), 0, dict(region=mask), target='b', against='c')
    x = picture(astro, 0)
    holed = torch.where(torch.from_numpy(mask), attribution_baselines['sky'](x), x)
    p = Explainer(astro).predict(holed).probabilities['b']
    assert a.ablated[0] == pytest.approx(p, abs=1e-5) and a.drops[0] == pytest.approx(a.probabilities['b'] - p, abs=1e-5)
    assert a.heatmap()[mask].mean() == pytest.approx(a.drops[0], abs=1e-6) and not a.heatmap()[~mask].any()


@pytest.mark.parametrize('regions', ['annuli', 'bulge', 'sectors', 'discs', 'bands'])
def test_every_set_of_regions(astro, regions):
    astro.model.train()
    before = state(astro.model)
    a = ablate(Explainer(astro), 1, regions)
    assert len(a.regions) == len(a.masks) == len(a.ablated) == len(a.drops) and np.isfinite(a.logits).all() and a.heatmap().shape == (64, 64)
    assert state(astro.model) == before


def test_ablation_can_be_stopped(astro):
    def stop(done, total): raise Stopped
    with pytest.raises(Stopped): ablate(Explainer(astro), 1, progress=stop)


def test_predicted_classes_are_those_of_the_calibrated_network():
    "A shift may change which class is the likeliest"
    learn = learner(astroformer('astroformer_nano', img_size=64, classes=3), galaxies())
    use_scaling(learn, Scaling('prior', (1.,), (0., 0., 9.)))
    assert predicted_classes(learn, range(4)) == [Explainer(learn).predict(i).predicted for i in range(4)] == [learn.dls.vocab[2]]*4


def test_loaders_that_name_other_classes_than_the_network_learnt_are_refused(tmp_path):
    galaxies = GalaxySet(np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8), pd.DataFrame(dict(label=list('ab')*10)), ('a', 'b'))
    other = replace(galaxies, classes=('b', 'a'))
    weights = save_astroformer(astroformer_learner(GalaxyDataLoaders.from_galaxies(galaxies, device='cpu'), 'astroformer_nano'), tmp_path/'w')
    learn = load_astroformer_learner(weights, 'cpu', other)
    assert list(learn.dls.vocab) == ['a', 'b'] and Explainer(learn).predict(0).predicted in 'ab'
    learn.dls = GalaxyDataLoaders.from_galaxies(other, device='cpu')
    with pytest.raises(GalaxyDataError, match='knows the classes a, b, in this order, and its loaders name b, a'): Explainer(learn).predict(0)
