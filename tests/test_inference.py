"""The folded network against the one it was made from: every layout, both kinds of convolution, copies and files."""
import copy, pickle

import pytest, torch
from torch import nn

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.models import inference
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.checkpoint import save_astroformer
from astroformer_astro.models.inference import ConvGelu, for_inference, onednn_fuses

kinds = [dict(layout='CCCT'), dict(layout='CCTT'), dict(layout='CCCB'), dict(layout='AAAT'), dict(layout='CTTT', rel_attn='post'), dict(layout='CCCT', equivariant=True),
         dict(layout='ABCT', equivariant=True), dict(layout='CCCT', strides=(2, 2, 2, 2), bands=5, drop_path=.2, drop=.1)]


def trained(**fields):
    "A network whose BatchNorms, biases and norms are not those of a fresh one"
    torch.manual_seed(0)
    model = astroformer('astroformer_nano', **fields).eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-1, 1); m.running_var.uniform_(.3, 3)
            m.weight.data.uniform_(.5, 1.5); m.bias.data.uniform_(-.5, .5)
        elif getattr(m, 'bias', None) is not None: m.bias.data.normal_(0, .05)
    return model


@pytest.fixture(params=['oneDNN', 'plain'])
def means(request, monkeypatch):
    "With the operator and without it; whether it was called"
    calls, operator = [], inference._onednn
    monkeypatch.setattr(inference, '_onednn', lambda *args: calls.append(1) or operator(*args))
    if request.param == 'plain': monkeypatch.setattr(inference, 'onednn_fuses', lambda: False)
    elif not onednn_fuses(): pytest.skip("this PyTorch does not have oneDNN's convolution with a GELU")
    calls.clear()
    return request.param, calls


@torch.no_grad()
@pytest.mark.parametrize('fields', kinds, ids=lambda f: ' '.join(map(str, f.values())))
def test_logits_and_maps_are_the_same(fields, means):
    model = trained(**fields)
    fast = for_inference(model)
    for size in [(64, 64), (96, 64)] if fields.get('equivariant') else [(64, 64), (69, 45), (32, 100)]:
        x = torch.randn(3, model.cfg.bands, *size)
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
        for ours, theirs in zip(fast.forward_intermediates(x, intermediates_only=True), model.forward_intermediates(x, intermediates_only=True)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5*theirs.abs().max().item())
    assert bool(means[1]) == (means[0] == 'oneDNN')
    assert sum(isinstance(m, nn.BatchNorm2d) for m in fast.modules()) == sum(isinstance(m.conv2_kxk, nn.Sequential) for m in fast.modules() if hasattr(m, 'conv2_kxk'))


@torch.no_grad()
@pytest.mark.parametrize('fields', kinds, ids=lambda f: ' '.join(map(str, f.values())))
def test_folding_is_exact_in_double_precision(fields):
    model = trained(**fields).double()
    x = torch.randn(2, model.cfg.bands, 64, 64).double()
    torch.testing.assert_close(for_inference(model)(x), model(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_equivariance_survives():
    fast, x = for_inference(trained(equivariant=True)), torch.randn(1, 3, 64, 64)
    shifted = x.roll((5, 11), (2, 3))
    assert (fast(shifted) - fast(x)).norm() < 1e-5*fast(x).norm()
    fast.double()
    assert (fast(shifted.double()) - fast(x.double())).norm() < 1e-12*fast(x.double()).norm()


@torch.no_grad()
def test_copies_files_and_new_weights(means):
    model, x = trained(), torch.randn(2, 3, 64, 64)
    fast = for_inference(model)
    for again in copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), for_inference(fast): torch.testing.assert_close(again(x), fast(x), rtol=0, atol=1e-6)
    other = for_inference(trained(drop=.1))
    first = next(m for m in other.modules() if isinstance(m, ConvGelu))
    other(x); first.weight.mul_(2)
    assert (other(x) - fast(x)).abs().max() > 1e-4, 'stale weights'
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(other(x), fast(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(fast.double().float()(x), model(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(fast.bfloat16()(x.bfloat16()).float(), model(x), rtol=0, atol=.1)


@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_under_every_mode(mode, means):
    with mode():
        model, x = trained(), torch.randn(2, 3, 64, 64)
        fast, logits = for_inference(model), model(x)
        torch.testing.assert_close(fast(x), logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x), logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(fast(x.clone()), logits, rtol=0, atol=1e-5)


def test_gradients_reach_the_image_and_not_the_weights(means):
    model, x = trained(), torch.randn(2, 3, 64, 64)
    fast, grads = for_inference(model), []
    for m in model, fast:
        x_ = x.clone().requires_grad_()
        m(x_).square().sum().backward()
        grads.append(x_.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-5*grads[0].abs().max().item())
    assert grads[0].abs().max() > 0 and all(p.grad is None for p in fast.parameters())
    assert all(p.requires_grad for p in model.parameters()), 'the original is left alone'


@torch.no_grad()
def test_attention_is_seen(means):
    model, x, seen = trained(layout='CCTT'), torch.randn(2, 3, 64, 64), []
    fast = for_inference(model)
    for m in model, fast:
        handle = m.stages[2][0].attn.attend.register_forward_hook(lambda m, i, out: seen.append(out))
        m(x); handle.remove()
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-5)


def test_it_does_not_train():
    model = trained()
    fast = for_inference(model.train())
    assert model.training and not any(m.training for m in fast.modules())
    with pytest.raises(RuntimeError, match='only predicts'): fast.train()
    assert not fast.eval().training


@torch.no_grad()
def test_under_a_compiler_and_autocast():
    model, x = trained(), torch.randn(2, 3, 64, 64)
    fast = for_inference(model)
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16): torch.testing.assert_close(fast(x).float(), model(x).float(), rtol=0, atol=.1)


def test_a_folded_network_is_not_saved_as_what_it_was(tmp_path):
    with pytest.raises(GalaxyDataError, match='save the network that it was made from'): save_astroformer(for_inference(astroformer('astroformer_nano')), tmp_path/'folded')
    assert not list(tmp_path.iterdir())
