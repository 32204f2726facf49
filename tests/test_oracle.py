"""timm's MaxxVit, in which the published code is written, as the oracle for the network."""
import pytest, torch
from timm.models.maxxvit import MaxxVit, MaxxVitCfg

from astroformer_astro.models.astroformer import astroformer, model_cfgs
from astroformer_astro.models.checkpoint import from_timm, to_timm

# Published variants at 256 px, 10 classes: from the public code, run once
published = {'astroformer_0': 22_774_970, 'astroformer_1': 37_390_826, 'astroformer_2': 66_370_698,
             'astroformer_3': 148_892_362, 'astroformer_4': 241_088_650, 'astroformer_5': 593_558_346}
laptop = {'astroformer_nano': .3e6, 'astroformer_pico': 1e6, 'astroformer_tiny': 2e6}


def oracle(cfg):
    return MaxxVit(MaxxVitCfg(embed_dim=cfg.widths, depths=cfg.depths, block_type=tuple(cfg.layout), stem_width=cfg.stem_width,
                              head_hidden_size=cfg.widths[-1]), img_size=cfg.img_size, num_classes=cfg.classes)


def count(model): return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name', published)
def test_parameters_are_the_published_ones(name):
    with torch.device('meta'): model = astroformer(name, img_size=256)
    assert count(model) == published[name]


@pytest.mark.parametrize('name', laptop)
def test_laptop_sizes_keep_16_tokens(name):
    model = astroformer(name, img_size=64)
    assert count(model) == pytest.approx(laptop[name], rel=.15)
    assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape[-2:] == (4, 4)


def test_every_name_is_tried(): assert set(model_cfgs) == set(published) | set(laptop)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('size', [64, 128])
def test_logits_equal_timm(size, train):
    torch.manual_seed(0)
    ours = astroformer('astroformer_0', img_size=size).double().train(train)
    theirs = oracle(ours.cfg).double().train(train)
    theirs.load_state_dict(to_timm(ours.state_dict()))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


def test_names_map_both_ways():
    theirs = oracle(astroformer('astroformer_0', img_size=64).cfg).state_dict()
    again = to_timm(from_timm(theirs))
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize('name', ['stem.conv1.weight', 'stages.1.0.conv2_kxk.weight', 'stages.3.1.mlp.fc1.weight', 'stages.3.0.attn.qkv.weight'])
def test_starting_values_are_spread_as_the_oracles(name):
    torch.manual_seed(0)
    ours = astroformer('astroformer_0', img_size=64)
    theirs = from_timm(oracle(ours.cfg).state_dict())[name]
    assert ours.state_dict()[name].std() == pytest.approx(theirs.std().item(), rel=.05)


@pytest.mark.parametrize('size', [32, 33, 48, 69, 100, (40, 75)])
def test_odd_sizes_build_train_and_predict(size):
    h, w = (size, size) if isinstance(size, int) else size
    model = astroformer('astroformer_nano', img_size=size, bands=4, classes=3)
    model(torch.randn(2, 4, h, w)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(torch.randn(1, 4, h, w)).shape == (1, 3)
