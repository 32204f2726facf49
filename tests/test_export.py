"""The network under other roofs: every name in timm, the logits of ONNX Runtime on real galaxies, graphs for any batch."""
import pickle, subprocess, sys
from copy import deepcopy
from pathlib import Path

import numpy as np, pytest, timm, torch
from PIL import Image
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.interpret.attention import attention_maps
from astroformer_astro.models import export
from astroformer_astro.models.astroformer import astroformer, model_cfgs
from astroformer_astro.models.checkpoint import load_astroformer, save_astroformer
from astroformer_astro.models.export import export_onnx

pictures = Path(__file__).parents[2]/'shared'/'data'/'ngc_sdss'/'images'
slow = pytest.mark.slow
kinds = [dict(), dict(rel_attn='post', equivariant=True), pytest.param(dict(rel_attn='post'), marks=slow), pytest.param(dict(equivariant=True), marks=slow),
         pytest.param(dict(layout='BATT'), marks=slow)]


def lively(**kw):
    "A network whose statistics, tables and biases are away from where they start"
    torch.manual_seed(0)
    model = astroformer('astroformer_nano', depths=(1, 1, 1, 1), **kw)
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    for _ in range(3): model.train()(torch.randn(16, 3, 64, 64)).sum()
    return model.eval()


# ---- timm

def test_names_are_registered_by_import_alone():
    code = "import timm, astroformer_astro.models.export as e; print(*timm.list_models('astroformer*')); from astroformer_astro.models.export import *"
    done = subprocess.run([sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[-1000:]
    assert set(done.stdout.split()) == set(model_cfgs)


@pytest.mark.parametrize('name', model_cfgs)
def test_every_name_builds_as_timm_asks(name):
    cfg = model_cfgs[name]
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=7, in_chans=5, img_size=(64, 96), drop_rate=.1, drop_path_rate=.2)
        backbone = timm.create_model(name, features_only=True, out_indices=(0, -1))
        assert model(torch.zeros(2, 5, 64, 96)).shape == (2, 7)
        assert [m.shape[1] for m in backbone(torch.zeros(1, 3, 64, 64))] == [cfg.stem_width, cfg.widths[-1]]
    assert (model.cfg.classes, model.cfg.bands, model.cfg.img_size, model.cfg.drop, model.cfg.drop_path) == (7, 5, (64, 96), .1, .2)
    assert timm.get_pretrained_cfg(name).input_size == (3, *cfg.img_size) and model.default_cfg['classifier'] == 'head.fc' and not timm.is_model_pretrained(name)
    with pytest.raises(GalaxyDataError, match=f'nobody has published weights of {name};'): timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('layout', ['CCCT', 'AAAT'])
def test_optimisers_decay_what_they_should(layout):
    model = timm.create_model('astroformer_nano', img_size=64, layout=layout)
    decayed = {id(p) for g in create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=.05).param_groups if g['weight_decay'] for p in g['params']}
    for n, p in model.named_parameters(): assert (id(p) in decayed) == (p.ndim > 1 and not n.endswith(('.bias', '.down', '.across'))), n
    groups = param_groups_layer_decay(model, weight_decay=.05, layer_decay=.5)
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    assert len(scale) == len(list(model.parameters()))
    depth = [min(scale[id(p)] for p in part.parameters()) for part in (model.stem, *(b for s in model.stages for b in s), model.head)]
    assert all(a < b for a, b in zip(depth, depth[1:])), 'every block learns faster than the one before'


def test_a_network_from_timm_travels_like_any_other(tmp_path):
    model, x = timm.create_model('astroformer_nano', img_size=64, num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    for again in deepcopy(model), pickle.loads(pickle.dumps(model)), load_astroformer(save_astroformer(model, tmp_path/'w')): assert torch.equal(again(x), model(x))
    own = timm.create_model('astroformer_nano', img_size=64, num_classes=3, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path/'w.safetensors'), num_classes=3)).eval()
    assert torch.equal(own(x), model(x))


# ---- ONNX

@pytest.mark.skipif(not pictures.exists(), reason=f'no real galaxies at {pictures}')
@pytest.mark.parametrize('kw', kinds, ids=str)
def test_onnx_runtime_agrees_on_real_galaxies(tmp_path, kw):
    ort = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    galaxies = np.stack([np.asarray(Image.open(f).convert('RGB').resize((64, 64), Image.BOX)) for f in sorted(pictures.glob('*.jpg'))[::7][:16]])
    x = torch.as_tensor(galaxies).permute(0, 3, 1, 2)/255
    x, model = (x - x.mean((0, 2, 3), keepdim=True))/x.std((0, 2, 3), keepdim=True), lively(**kw)
    session = ort.InferenceSession(export_onnx(model, tmp_path/'g.onnx'))
    spread = model(x).detach().std(0).mean().item()
    assert spread > .01, 'galaxies must not look alike to the network'
    for batch in 1, 3, 16:
        found, expected = session.run(None, dict(images=x[:batch].numpy()))[0], model(x[:batch]).detach().numpy()
        print(kw, batch, 'largest difference', np.abs(found - expected).max(), 'spread', spread)
        assert np.abs(found - expected).max() < 1e-4


def test_nothing_is_half_written(tmp_path, monkeypatch):
    class Full:
        def save(self, path, **_):
            Path(path).write_bytes(b'half'); raise OSError(28, 'No space left on device', str(path))
    monkeypatch.setattr(export, '_traced', lambda *_: Full())
    (tmp_path/'g.onnx').write_text('the last one')
    with pytest.raises(GalaxyDataError, match='No space left'): export_onnx(astroformer('astroformer_nano'), tmp_path/'g')
    assert [p.name for p in tmp_path.iterdir()] == ['g.onnx'] and (tmp_path/'g.onnx').read_text() == 'the last one'


def test_without_onnx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'astroformer_astro\[export\]'): export_onnx(astroformer('astroformer_nano'), 'g')


# ---- graphs (of the plain network: in the notebook)

@pytest.mark.parametrize('kw', kinds[1:], ids=str)
def test_one_graph_for_any_batch(kw):
    model, x = lively(**kw), torch.randn(16, 3, 64, 64)
    graph = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    for batch in 1, 3, 16: assert torch.allclose(graph(x[:batch]), model(x[:batch]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('kw', kinds[1:], ids=str)
def test_a_compiled_network_can_be_trained_and_watched(kw):
    model, x = lively(**kw), torch.randn(1, 3, 64, 64)
    before = attention_maps(model, x).maps
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    assert torch.allclose(compiled(x), model(x), atol=1e-6, rtol=1e-5)
    for watched in model, compiled:
        after = attention_maps(watched, x).maps
        assert len(after) == len(before) and all(np.array_equal(a, b) for a, b in zip(after, before))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
