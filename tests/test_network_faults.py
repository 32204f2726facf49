"""Faults that a reviewer found in the network; each test failed before its fault was mended."""
import pytest, torch
from torch import nn

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.attention import RelativeAttention, RelativeBias
from astroformer_astro.models.checkpoint import load_astroformer, load_pretrained, save_astroformer
from astroformer_astro.models.equivariance import D4Average
from astroformer_astro.models.export import export_onnx
from astroformer_astro.models.inference import for_inference
from timm.models.maxxvit import MaxxVit, MaxxVitCfg


def fused(attn, x):
    q, k, v = attn._qkv(x)
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=attn.rel_pos(x.shape[-2:])[None])
    return torch.nn.attention.SDPBackend(choice) != torch.nn.attention.SDPBackend.MATH


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_the_fused_kernel_is_taken(layout):
    attn, x = RelativeAttention(16, 64, size=(4, 5)), torch.randn(2, 16, 4, 5).to(memory_format=layout)
    with torch.no_grad(): assert fused(attn, x)


def test_toroidal_tables_are_resized_from_what_was_trained():
    bias = RelativeBias((4, 4), 2); bias.toroidal = True
    before = bias((8, 8)).detach().clone()
    used = torch.zeros(49, dtype=bool)
    bias((4, 4)).sum().backward(); used |= bias.bias.grad.abs().sum(1) > 0
    assert used.sum() == 16
    with torch.no_grad(): bias.bias[~used] += 100
    torch.testing.assert_close(bias((8, 8)), before)


def test_a_table_that_varies_down_only_stays_so():
    bias = RelativeBias((3, 5), 1)
    with torch.no_grad(): bias.bias[:] = torch.arange(5.)[:, None].repeat(1, 9).reshape(-1, 1)
    table = bias.resized((5, 9)).detach().view(9, 17)
    assert torch.allclose(table, table[:, :1].expand(-1, 17), atol=1e-5) and table[0, 0] == 0 and table[-1, 0] == 4


class Hard(nn.Module):
    def forward(self, s): return nn.functional.one_hot(s.argmax(-1), s.shape[-1]).to(s.dtype)


def test_another_attend_is_used():
    attn, x = RelativeAttention(16, 64, size=4), torch.randn(2, 16, 4, 4)
    soft = attn(x); attn.attend = Hard()
    assert (attn(x) - soft).abs().max() > 1e-3


def test_recompute_compiles():
    model, x = astroformer('astroformer_nano', img_size=32), torch.randn(2, 3, 32, 32)
    model.set_grad_checkpointing()
    torch.compile(model, backend='eager')(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_recompute_rests_every_kind_of_batchnorm():
    model = astroformer('astroformer_nano', img_size=32)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.__class__ = type('OtherNorm', (nn.modules.batchnorm._BatchNorm,), dict(_check_input_dim=lambda self, x: None, forward=nn.BatchNorm2d.forward))
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert model.stages[0][0].pre_norm.num_batches_tracked == 1


@pytest.mark.parametrize('wrong', [dict(strides=(4, 2, 2, 1)), dict(strides=(0, 2, 2, 1)), dict(bands=0), dict(classes=-1), dict(depths=(1, 0, 1, 1)), dict(img_size=64.5),
                                   dict(classes=['a', 'b']), dict(bands='grz'), dict(layout='CCC'), dict(layout=None)])
def test_nonsense_is_refused_in_one_sentence(wrong):
    with pytest.raises(ValueError) as e: astroformer('astroformer_nano', **wrong)
    assert len(str(e.value)) < 200 and 'AstroformerCfg(' not in str(e.value)


def test_drop_path_rises_as_in_timm():
    cfg = dict(embed_dim=(16, 32, 64, 128), depths=(1, 1, 2, 1), block_type=tuple('CCCT'), stem_width=16, head_hidden_size=128)
    theirs = MaxxVit(MaxxVitCfg(**cfg), img_size=64, drop_path_rate=.2)
    rates = lambda m: [d for c in m.modules() if (d := getattr(c, 'drop_prob', None)) is not None and d > 0]
    ours = [b.drop_path.drop_prob for s in astroformer('astroformer_nano', strides=(2, 2, 2, 2), drop_path=.2).stages for b in s]
    assert max(ours) == pytest.approx(.2) and sorted(set(map(lambda r: round(r, 6), rates(theirs)))) == sorted({round(r, 6) for r in ours if r})


def test_other_pooling_is_refused_rather_than_forgotten():
    with pytest.raises(ValueError, match='avg'): astroformer('astroformer_nano').reset_classifier(4, 'max')


def test_an_average_is_not_written_as_its_network(tmp_path):
    for write in save_astroformer, export_onnx:
        with pytest.raises(GalaxyDataError, match='not a D4Average'): write(D4Average(astroformer('astroformer_nano')), tmp_path/'a')
    assert not list(tmp_path.iterdir())


def test_resized_tables_are_named(tmp_path):
    path = save_astroformer(astroformer('astroformer_nano', classes=2), tmp_path/'a', classes=['a', 'b'])
    assert load_pretrained(astroformer('astroformer_nano', img_size=128, classes=2), path, ['a', 'b']) == ['stages.3.0.attn.rel_pos.bias']
    assert load_pretrained(astroformer('astroformer_nano', classes=2), path, ['a', 'b']) == []


def test_forward_derivatives_of_a_folded_network():
    model = for_inference(astroformer('astroformer_nano').eval())
    x, v = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): _, slope = torch.func.jvp(model, (x,), (v,))
    exact = (model.double()(x.double() + 1e-4*v.double()) - model(x.double() - 1e-4*v.double()))/2e-4
    torch.testing.assert_close(slope.double(), exact, rtol=1e-2, atol=1e-3)
