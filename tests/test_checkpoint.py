"""Weights and cards: what is saved comes back bit for bit, what was damaged never does, and bands change without forgetting."""
import hashlib, json, pickle, random, shutil, warnings
from copy import deepcopy

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load, save

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.models.attention import offset_index
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.checkpoint import adapt_bands, load_astroformer, load_pretrained, read_card, save_astroformer

small = dict(name='astroformer_nano', img_size=32, classes=3)
kinds = [dict(layout=l) for l in ('CCCT', 'BBBB', 'AAAT', 'CTTT', 'CCCB')] + [dict(rel_attn='post'), dict(equivariant=True), dict(equivariant=True, layout='BACT', rel_attn='post', drop_path=.1, drop=.2)]
known = dict(classes=['a', 'b', 'c'], stats=[[.1, .2, .3], [.4, .5, .6]], bands=['g', 'r', 'z'])


@pytest.fixture(scope='module')
def saved(tmp_path_factory): return save_astroformer(astroformer(**small), tmp_path_factory.mktemp('w')/'galaxies', survey='x', **known)


def trained(**kw):
    "Statistics, tables and biases away from where they start"
    model = astroformer(**small, **kw)
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    with torch.no_grad(): model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


# ---- there and back

@pytest.mark.parametrize('kw', kinds, ids=str)
def test_every_kind_comes_back_bit_for_bit(tmp_path, kw):
    for dtype in torch.float32, torch.float64:
        model, x = trained(**kw).to(dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
        for again in (deepcopy(model), pickle.loads(pickle.dumps(model)), load_astroformer(save_astroformer(model, tmp_path/'w'))):
            assert torch.equal(again(x), model(x)) and again.cfg == model.cfg and not again.training
            assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        again.train()(x).sum().backward()


def test_to_load_touches_no_dice(saved):
    torch.manual_seed(0); expected = torch.rand(1)
    torch.manual_seed(0); load_astroformer(saved)
    assert torch.equal(torch.rand(1), expected)


def test_a_loaded_network_keeps_its_card(saved, tmp_path):
    again = read_card(save_astroformer(load_astroformer(saved), tmp_path/'again', note='copied'))
    assert {k: again[k] for k in known} == known and again['record'] == dict(note='copied')


def test_numpy_in_a_record_becomes_numbers(tmp_path):
    card = read_card(save_astroformer(astroformer(**small), tmp_path/'w', stats=(np.ones(3), np.ones(3)), score=np.float32(.5), where=tmp_path))
    assert card['stats'] == [[1, 1, 1]]*2 and card['record'] == dict(score=.5, where=str(tmp_path))


@pytest.mark.parametrize('wrong', [dict(classes=['a']), dict(stats=[[1], [1]]), dict(bands=['g'])], ids=str)
def test_a_card_that_does_not_suit_the_network_is_not_written(tmp_path, wrong):
    with pytest.raises(GalaxyDataError, match='it names 1 .*, the network has 3'): save_astroformer(astroformer(**small), tmp_path/'w', **wrong)
    assert not list(tmp_path.iterdir())


# ---- damage

def one_sentence(e): return isinstance(e, GalaxyDataError) and '\n' not in str(e) and len(str(e)) < 500


def never_wrong(path, whole):
    "Either one sentence, or the network and the card that were saved"
    try: found = load_astroformer(path)
    except Exception as e:
        assert one_sentence(e), repr(e)
        return False
    assert found.cfg == whole.cfg and all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), whole.state_dict().values()))
    assert all(found.card[k] == whole.card[k] for k in whole.card if k != 'record')
    return True


def test_flipped_and_cut_weights_are_refused(saved, tmp_path):
    dice, whole, data = random.Random(0), load_astroformer(saved), saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], 'little')
    shutil.copy(saved.with_suffix('.json'), tmp_path)
    where = [dice.randrange(a, b) for a, b in ((0, 8), (8, header), (header, len(data))) for _ in range(25)]
    damaged = [data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i+1:] for i in where] + [data[:i] for i in [0, 7, 8, *where]] + [data + b'\0']
    for d in damaged:
        (tmp_path/saved.name).write_bytes(d)
        assert not never_wrong(tmp_path/saved.name, whole)


def test_flipped_and_cut_weights_are_refused_though_the_hash_was_made_anew(saved, tmp_path):
    "Somebody repairs the card by hand: then the header still has to be readable, and the tensors have to fit"
    dice, data, card = random.Random(1), saved.read_bytes(), read_card(saved)
    header, refused = 8 + int.from_bytes(data[:8], 'little'), 0
    for i in [dice.randrange(header) for _ in range(100)]:
        d = data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i+1:] if i % 2 else data[:i]
        (tmp_path/saved.name).write_bytes(d)
        (tmp_path/'galaxies.json').write_text(json.dumps(card | dict(weights_sha256=hashlib.sha256(d).hexdigest())))
        try: load_astroformer(tmp_path/saved.name)
        except Exception as e:
            assert one_sentence(e), repr(e)
            refused += 1
    assert refused > 90


def test_flipped_and_cut_cards_are_refused_or_say_the_same(saved, tmp_path):
    dice, whole, card = random.Random(2), load_astroformer(saved), saved.with_suffix('.json').read_bytes()
    shutil.copy(saved, tmp_path)
    where, accepted = [dice.randrange(len(card)) for _ in range(300)], 0
    for i in where:
        d = card[:i] + bytes([card[i] ^ 1 << dice.randrange(8)]) + card[i+1:] if i % 3 else card[:i]
        (tmp_path/'galaxies.json').write_bytes(d)
        accepted += never_wrong(tmp_path/saved.name, whole)
    assert accepted < 30, 'only a change of the record may pass'


@pytest.mark.parametrize('change', [dict(classes=['b', 'a', 'c']), dict(classes=7), dict(stats=[[9, .2, .3], [.4, .5, .6]]), dict(bands=['r', 'g', 'z']), dict(stretch=dict(name='log')), dict(more=1)], ids=str)
def test_a_card_that_says_otherwise_is_refused(saved, tmp_path, change):
    shutil.copy(saved, tmp_path)
    (tmp_path/'galaxies.json').write_text(json.dumps(read_card(saved) | change))
    with pytest.raises(GalaxyDataError, match=f'says {next(iter(change))} .*, but galaxies.safetensors was saved with') as e: load_astroformer(tmp_path/saved.name)
    assert one_sentence(e.value)


cfg_values = st.one_of(st.none(), st.booleans(), st.integers(-2, 10**12), st.floats(), st.text(max_size=4), st.lists(st.integers(-1, 10**9), max_size=5), st.just({}))
@settings(deadline=None, max_examples=60, database=None)
@given(field=st.sampled_from(['widths', 'depths', 'strides', 'layout', 'rel_attn', 'stem_width', 'head_width', 'img_size', 'bands', 'classes', 'drop_path']), value=cfg_values)
def test_an_old_card_written_by_hand_gives_one_sentence(saved, tmp_path_factory, field, value):
    "Cards from before the header had one are compared with nothing, so whatever they say is tried, and no memory is taken to try it"
    folder, data = tmp_path_factory.getbasetemp(), save(load(saved.read_bytes()))
    (folder/'old.safetensors').write_bytes(data)
    card = read_card(saved) | dict(weights_sha256=hashlib.sha256(data).hexdigest())
    (folder/'old.json').write_text(json.dumps(card | dict(cfg=card['cfg'] | {field: value})))
    try: load_astroformer(folder/'old')
    except Exception as e: assert one_sentence(e), repr(e)


def test_weights_of_another_network_name_both(saved):
    for other, found in ((dict(name='astroformer_pico'), 'are of astroformer_nano, not of astroformer_pico'), (dict(rel_attn='post'), 'rel_attn pre instead of post'), (dict(layout='CCCC'), 'layout CCCT instead of CCCC')):
        with pytest.raises(GalaxyDataError, match=found): load_pretrained(astroformer(**small | other), saved)


# ---- bands

names = st.lists(st.sampled_from('ugrizyJHK'), min_size=1, max_size=9, unique=True).map(tuple)
def kernel(n): return torch.randn(4, n, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


@settings(deadline=None, database=None)
@given(old=st.one_of(names, st.integers(1, 9)), new=st.one_of(names, st.integers(1, 9)))
def test_a_grey_galaxy_is_answered_as_before(old, new):
    n, m = (b if isinstance(b, int) else len(b) for b in (old, new))
    w = kernel(n)
    v, grey = adapt_bands(w, old, new), torch.randn(1, 1, 9, 9, dtype=torch.float64)
    assert v.shape == (4, m, 3, 3)
    assert torch.allclose(torch.conv2d(grey.expand(1, m, 9, 9), v), torch.conv2d(grey.expand(1, n, 9, 9), w), atol=1e-12)


@settings(deadline=None, database=None)
@given(old=names, new=names)
def test_bands_keep_their_own_kernels(old, new):
    w = kernel(len(old))
    v = adapt_bands(w, old, new)
    if set(old) <= set(new):
        for i, b in enumerate(new): assert torch.equal(v[:,i], w[:,old.index(b)] if b in old else torch.zeros(4, 3, 3, dtype=w.dtype))
        assert torch.equal(adapt_bands(v, new, old), w), 'what was widened can be narrowed again'
    elif set(old) & set(new):
        change = [v[:,new.index(b)] - w[:,old.index(b)] for b in new if b in old]
        assert all(torch.allclose(c, change[0], atol=1e-12) for c in change), 'every band kept takes the same share'
        assert all((v[:,i] == 0).all() for i, b in enumerate(new) if b not in old)


@pytest.mark.parametrize('bands', ['rgz', 'grizy', 'zyrg'])
def test_logits_do_not_change_with_more_or_reordered_bands(saved, bands):
    old, new = load_astroformer(saved).double(), astroformer(**small, bands=len(bands)).double().eval()
    with pytest.warns(UserWarning, match='keep what they learnt'): left = load_pretrained(new, saved, classes=known['classes'], bands=bands)
    assert left == ['stem.conv1.weight']
    x = torch.randn(3, len(bands), 32, 32).double()
    assert torch.allclose(new(x), old(x[:, [bands.index(b) for b in 'grz']]), atol=1e-12, rtol=0)


def test_bands_without_names(saved, tmp_path):
    unnamed = save_astroformer(load_astroformer(saved), tmp_path/'u', bands=[])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for path, bands in (unnamed, ()), (saved, 'grz'): assert 'stem.conv1.weight' not in load_pretrained(astroformer(**small), path, bands=bands)
    for path, bands, named in (unnamed, 'JHK', 'J, H, K are taken .* that the weights do not name'), (saved, (), 'g, r, z are taken .* that these galaxies do not name'):
        with pytest.warns(UserWarning, match=named): assert 'stem.conv1.weight' not in load_pretrained(astroformer(**small), path, bands=bands)
    for bands in 1, 5:
        new = astroformer(**small, bands=bands)
        with pytest.warns(UserWarning, match=f'each of the {bands} bands starts from the mean of the 3 trained ones'): load_pretrained(new, unnamed)
    with pytest.raises(GalaxyDataError, match='2 bands are named, g, r, but the network takes 3'): load_pretrained(astroformer(**small), saved, bands=('g', 'r'))
    with pytest.raises(GalaxyDataError, match="'g' is named twice"): load_pretrained(astroformer(**small), saved, bands=('g', 'g', 'r'))


@pytest.mark.parametrize('old, new', [(False, True), (True, False)])
def test_plain_and_equivariant_start_from_each_other(tmp_path, old, new):
    path = save_astroformer(trained(equivariant=old), tmp_path/'w', **known)
    model = astroformer(**small, equivariant=new).eval()
    assert load_pretrained(model, path, classes=known['classes']) == [] and model.cfg.equivariant is new
    theirs, trained_rows = load(path.read_bytes()), {f'{k}.bias': offset_index(*m.size, old).unique() for k, m in model.named_modules() if hasattr(m, 'resized')}
    known_part = lambda k, t: t[trained_rows[k]] if k in trained_rows else t
    for k, v in model.state_dict().items(): assert torch.equal(known_part(k, v), known_part(k, theirs[k])), k
