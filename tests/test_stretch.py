"""Stretches: torch against astropy over random settings and images, gradients, what a survey's limits promise, real cubes."""
import json, pickle
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
from astropy.io import fits
from astropy.visualization import make_lupton_rgb
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.stretch import Stretch, bands_to_rgb, lupton_stretch
from astroformer_astro.data.tensor import TensorGalaxy
from astroformer_astro.synth import synth_galaxy

names = 'asinh', 'log', 'sqrt', 'linear', 'lupton'
real = Path(__file__).parent.parent.parent/'shared'/'data'/'fits'/'decals_grz_cube'
some = settings(max_examples=80, deadline=None)


@st.composite
def stretches(draw, bands=3):
    "Any stretch that makes sense for images of so many bands"
    name, interval = draw(st.sampled_from(names)), draw(st.sampled_from(['percentile', 'zscale', 'minmax', 'fixed']))
    a = draw(st.none() | (st.floats(1, 1e4) if name == 'log' else st.floats(1e-3, 10)))
    low = draw(st.lists(st.floats(-10, 10), min_size=bands, max_size=bands)) if interval == 'fixed' else None
    high = [l + draw(st.floats(1e-3, 1e3)) for l in low] if low else None
    p = sorted(draw(st.tuples(st.floats(0, 100), st.floats(0, 100))))
    percent = draw(st.floats(1, 100)) if p[1] - p[0] < 1 else draw(st.sampled_from([p, p[1]]))
    return Stretch(name, a, interval, percent, draw(st.floats(.05, 1)), low, high)


@st.composite
def images(draw, bands=3, holes=True, dtype=np.float64):
    "A batch with outliers, constant bands, missing pixels and whole bands of nothing"
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.normal(draw(st.sampled_from([0, 5, -3])), draw(st.floats(.01, 10)), (2, bands, *draw(st.tuples(*[st.integers(1, 17)]*2))))
    x[rng.random(x.shape) < draw(st.sampled_from([0, .02, .3]))] *= draw(st.sampled_from([1e-6, 100, 1e5]))
    if draw(st.booleans()): x[0, 0] = draw(st.sampled_from([0, -2, 7]))
    if holes:
        x[rng.random(x.shape) < draw(st.sampled_from([0, .1, .7]))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        if draw(st.booleans()): x[1, -1] = np.nan
    return x.astype(dtype)


@some
@given(stretches(), images())
def test_torch_is_astropy(s, x):
    y = s(x)
    assert y.dtype == np.float32 and y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    np.testing.assert_allclose(s(torch.from_numpy(x)).numpy(), y, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(s(x[1]), y[1])


@some
@given(stretches(), images(dtype=np.float32))
def test_torch_is_astropy_in_single_precision(s, x):
    y = s(torch.from_numpy(x))
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), s(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize('interval', ['percentile', 'zscale', 'minmax'])
@pytest.mark.parametrize('name', names)
def test_constant_bands_are_black(name, interval):
    s = Stretch(name, interval=interval)
    for value in -2, 0, .1, 7, 1e5:
        for side in 1, 2, 3, 5, 9, 40:
            x = np.full((2, side, side), value)
            assert s(x).max() < 1e-6 and s(torch.from_numpy(x)).max() < 1e-6


@some
@given(st.floats(.01, 100), st.floats(.1, 30), st.tuples(*[st.floats(-5, 5)]*3), images(holes=False))
def test_lupton_is_astropy(stretch, q, minimum, x):
    "In the parameters of Lupton et al., and in a softening and a white point shared by the bands"
    red, green, blue = x[0, ::-1]
    theirs = make_lupton_rgb(red, green, blue, minimum=minimum[::-1], stretch=stretch, Q=q, output_dtype=float)
    ours = lupton_stretch(stretch, q, minimum)
    for y in ours(x[0]), ours(torch.from_numpy(x[0])).numpy():
        np.testing.assert_allclose(y[::-1].transpose(1, 2, 0), theirs, rtol=0, atol=1e-6)
    assert np.abs(ours.picture(x[0]) - 255*theirs).max() < .51


@some
@given(st.floats(1e-3, 10), st.integers(1, 6), st.integers(0, 2**32))
def test_lupton_keeps_colours(a, bands, seed):
    x = np.random.default_rng(seed).uniform(.01, 3, (bands, 5, 5))
    y = Stretch('lupton', a, low=0, high=1)(x)
    np.testing.assert_allclose(y/y.sum(0), x/x.sum(0), rtol=1e-5)
    if bands == 1: np.testing.assert_allclose(y, Stretch('asinh', a, low=0, high=1)(x), atol=1e-6)


@some
@given(stretches().filter(lambda s: s.name != 'lupton'), images(holes=False), st.randoms())
def test_brighter_is_never_darker(s, x, random):
    for y, flux in zip(s(x).reshape(6, -1), x.reshape(6, -1)): assert (np.diff(y[flux.argsort()]) >= 0).all()


@some
@given(stretches(), images())
def test_gradients_are_finite(s, x):
    "At the limits, below and above them, in constant bands and beside missing pixels"
    x = torch.from_numpy(x)
    if s.low: x[0, :, 0, 0], x[1, :, -1, -1] = torch.tensor(s.low), torch.tensor(s.high)
    grad, = torch.autograd.grad(s(x.requires_grad_()).sum(), x)
    assert grad.isfinite().all() and (grad[~x.isfinite()] == 0).all()


@pytest.mark.parametrize('name', names)
def test_gradients_are_right(name):
    torch.manual_seed(0)
    x = (torch.rand(2, 3, 4, 4, dtype=torch.float64)*.4 + .1).requires_grad_()
    assert torch.autograd.gradcheck(Stretch(name, low=(0, .01, .02), high=1), x)


@some
@given(stretches())
def test_settings_survive_json_and_pickle(s):
    for t in Stretch.from_dict(json.loads(json.dumps(s.to_dict()))), pickle.loads(pickle.dumps(s)), replace(s):
        assert t == s and hash(t) == hash(s)


@some
@given(st.dictionaries(st.sampled_from(['name', 'a', 'interval', 'percent', 'contrast', 'low', 'high', 'gamma']),
                       st.none() | st.floats() | st.text(max_size=3) | st.sampled_from([*names, 'zscale']) | st.lists(st.floats(-9, 9), max_size=3)))
def test_bad_settings_are_refused_in_a_sentence(settings):
    try: Stretch.from_dict(settings)(np.random.default_rng(0).random((1, 4, 4)))
    except GalaxyDataError as e: assert str(e)[-1] == '.' and '\n' not in str(e)


def test_the_type_and_dtype_of_a_tensor_stay():
    x = TensorGalaxy(torch.rand(2, 3, 8, 8))
    for name in names:
        y = Stretch(name)(x.requires_grad_())
        assert type(y) is TensorGalaxy and y.requires_grad
    assert type(Stretch()(torch.nn.Parameter(torch.rand(3, 8, 8)))) in (torch.Tensor, torch.nn.Parameter)
    assert Stretch()(torch.rand(3, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert Stretch()(np.arange(48, dtype='>i2').reshape(3, 4, 4)).dtype == np.float32


def test_an_empty_batch_stays_empty():
    assert Stretch()(np.zeros((0, 3, 8, 8))).shape == Stretch()(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize('bands', [1, 2, 3, 4, 5, 7])
def test_pictures_of_any_number_of_bands(bands):
    x = np.random.default_rng(0).random((bands, 6, 7)).astype(np.float32)
    s = Stretch('linear', low=[0]*bands, high=np.arange(bands) + 1.)
    p = s.picture(x)
    assert p.shape == (6, 7, 3) and p.dtype == np.uint8
    np.testing.assert_array_equal(p, s.picture(torch.from_numpy(x)))
    np.testing.assert_array_equal(p, bands_to_rgb(torch.from_numpy(s(x))))
    np.testing.assert_array_equal(p[..., 2], np.round(255*x[0]))
    np.testing.assert_array_equal(p[..., 0], np.round(255*x[-1]/bands))


@pytest.fixture(scope='module')
def survey(): return np.stack([synth_galaxy(k % 10, rng=k, size=48)[0] for k in range(40)]).transpose(0, 2, 3, 1)


def test_a_survey_is_read_from_disk_as_from_memory(survey, tmp_path):
    np.save(tmp_path/'s.npy', survey)
    on_disk = np.load(tmp_path/'s.npy', mmap_mode='r')
    for kw in {}, dict(pixels=5000), dict(rows=[3, 9, 30]):
        assert Stretch().fit(on_disk, **kw) == Stretch().fit(survey, **kw)
    full, few = Stretch().fit(survey), Stretch().fit(survey, pixels=20_000)
    np.testing.assert_allclose(few.low, full.low, rtol=.2)
    np.testing.assert_allclose(few.high, full.high, rtol=.6)


@pytest.mark.parametrize('name', names)
def test_a_survey_keeps_differences_in_brightness(survey, name):
    "And only by its limits: those of each image make the faint as bright as the bright"
    s = Stretch(name).fit(survey)
    galaxy = survey[15].transpose(2, 0, 1)
    centre = lambda s, k: s(galaxy*k)[:, 20:28, 20:28].mean()
    assert centre(s, .1) < .8*centre(s, 1) < centre(s, 1)
    assert centre(Stretch(name, interval='minmax'), .1) == pytest.approx(centre(Stretch(name, interval='minmax'), 1), abs=1e-4)


def test_missing_pixels_do_not_move_the_limits(survey):
    holed = survey.copy()
    holed[::2, :8] = np.nan
    a, b = Stretch().fit(survey), Stretch().fit(holed)
    np.testing.assert_allclose(b.low, a.low, rtol=.25)
    np.testing.assert_allclose(b.high, a.high, rtol=.25)


def test_empty_parts_do_not_hide_the_noise(survey):
    "Half of the cut-outs lie half outside the survey's footprint, where files hold zeros"
    cut = survey.copy()
    cut[::2, :30] = 0
    a, b = Stretch().fit(survey), Stretch().fit(cut)
    np.testing.assert_allclose(b.low, a.low, rtol=.4)
    np.testing.assert_allclose(b.a, a.a, rtol=.4)


def test_a_survey_without_noise_or_without_galaxies():
    rng = np.random.default_rng(0)
    empty = rng.normal(0, 1, (5, 32, 32, 2))
    s = Stretch().fit(empty)
    assert np.all(np.array(s.high) > s.low) and 0 < s.a
    quiet = np.zeros((5, 32, 32, 2))
    quiet[:, 12:20, 12:20] = rng.uniform(1, 2, (5, 8, 8, 2))
    s = Stretch().fit(quiet)
    assert s.low == (0, 0) and s.a is None and s(quiet.transpose(0, 3, 1, 2)).max() == 1
    with pytest.raises(GalaxyDataError, match='constant or has no values'): Stretch().fit(np.full((2, 8, 8, 3), np.nan))


@pytest.mark.skipif(not real.is_dir(), reason=f'{real} is not there')
def test_real_cubes():
    "Five DECaLS cubes, one of them half empty: dark sky, visible galaxy, equal in torch"
    cubes = [fits.getdata(f).astype(np.float32) for f in sorted(real.glob('*.fits'))]
    assert len(cubes) == 5
    cut = [slice((len(c[0]) - 128)//2, (len(c[0]) + 128)//2) for c in cubes]
    middle = np.stack([c[:, part, part] for c, part in zip(cubes, cut)])
    for name in names:
        s = Stretch(name).fit(middle.transpose(0, 2, 3, 1))
        for c in cubes:
            np.testing.assert_allclose(s(torch.from_numpy(c)).numpy(), s(c), rtol=0, atol=2e-6)
            np.testing.assert_allclose(Stretch(name)(torch.from_numpy(c)).numpy(), Stretch(name)(c), rtol=0, atol=2e-6)
    sky, core = Stretch().fit(middle.transpose(0, 2, 3, 1))(middle), slice(60, 68)
    assert np.median(sky) < .2 and (sky[:, :, core, core].mean((2, 3)).max(1) > 3*np.median(sky)).all()


def test_large_whole_numbers_keep_their_digits():
    counts = (2**30 + np.random.default_rng(0).integers(0, 4000, (2, 3, 16, 16))).astype(np.int32)
    for s in Stretch(), Stretch('lupton', low=2**30, high=2**30 + 4000), Stretch('log', interval='zscale'):
        assert np.allclose(s(torch.tensor(counts)), s(counts), atol=1e-6)
