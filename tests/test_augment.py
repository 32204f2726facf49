"""What must hold of every augmentation, whatever it draws."""
import math

import numpy as np, pandas as pd, pytest, torch
from astropy.io import fits
from hypothesis import given, settings, strategies as st

from astroformer_astro.core import GalaxyDataError, seed_everything
from astroformer_astro.data.augment import (BandDropout, BandGain, Cutout, GalaxyAugment, Seeing, SkyLevel, SkyNoise, affine, blur, border_sky,
                                            dihedral, resample)
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.tensor import TensorGalaxy
from astroformer_astro.synth import synth_fits, synth_galaxy10

everything = dict(GalaxyAugment=GalaxyAugment, jitter=lambda: GalaxyAugment(jitter=2.), redshift=lambda: GalaxyAugment(redshift=(.05, .3), seeing=1.3),
                  Seeing=lambda: Seeing(2.), BandGain=BandGain, SkyLevel=lambda: SkyLevel(.1, .2), SkyNoise=lambda: SkyNoise(.1, gain=50.),
                  depth=lambda: SkyNoise(depth=21., now=23.), BandDropout=lambda: BandDropout(.5), Cutout=Cutout)


def galaxies(seed, n=4, bands=3, size=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = TensorGalaxy(torch.randn(n, bands, size, size, generator=g).to(dtype))
    x.pxscale = torch.rand(n, generator=g) + .1
    return x


@pytest.mark.parametrize('name', everything)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), bands=st.integers(2, 5), size=st.integers(32, 65))
def test_shape_type_finiteness_and_seed(name, seed, bands, size):
    x, before = galaxies(seed, bands=bands, size=size), galaxies(seed, bands=bands, size=size)
    tfm = everything[name]()
    draws = []
    for _ in 'ab':
        torch.manual_seed(seed)
        draws.append(tfm(x, split_idx=0))
    y = draws[0]
    assert type(y) is TensorGalaxy and y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert torch.equal(*draws)                                        # a seed repeats it
    assert torch.equal(x, before)                                     # what went in is not written over
    assert torch.equal(tfm(x, split_idx=1), x)                        # validation is left alone
    assert y.pxscale.shape == x.pxscale.shape and y.pxscale.isfinite().all()


@pytest.mark.parametrize('name', [n for n in everything if n != 'BandDropout'])
def test_each_galaxy_draws_for_itself(name):
    torch.manual_seed(0)
    x = TensorGalaxy(torch.randn(1, 3, 40, 40).expand(64, -1, -1, -1).contiguous())
    x.pxscale = torch.full((64,), .5)
    assert len({y.numpy().tobytes() for y in everything[name]()(x, split_idx=0)}) > 16


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 7))
def test_dihedral_is_a_group(i, j, k):
    "Closed, with an inverse, and associative: exactly, on arrays in which no two pixels are alike"
    x = torch.arange(75.).view(1, 3, 5, 5)
    turn = lambda t, k: dihedral(t, torch.tensor([k]))
    all8 = [turn(x, k) for k in range(8)]
    product = next(n for n in range(8) if torch.equal(turn(turn(x, i), j), all8[n]))
    assert any(torch.equal(turn(turn(x, i), n), x) for n in range(8))
    assert torch.equal(turn(turn(turn(x, i), j), k), turn(turn(x, product), k))


@settings(max_examples=25, deadline=None)
@given(st.floats(-math.pi, math.pi), st.floats(4, 7), st.floats(.35, 1))
def test_rotation_keeps_the_light_of_a_centred_galaxy(angle, width, flattening):
    "One that lies within its cut-out, 4.5 sigma to each side, and that pixels sample: a minor axis of sigma 1.4 px or more"
    t = torch.arange(65.) - 32
    x = torch.exp(-(t**2 + (t[:,None]/flattening)**2)/2/width**2)[None,None]
    y = resample(x, affine(torch.tensor([angle]), torch.ones(1), torch.zeros(1, 2)))
    assert abs(float(y.sum()/x.sum()) - 1) < .01


@settings(max_examples=25, deadline=None)
@given(st.floats(2.5, 5), st.floats(.5, 10))
def test_psf_gets_the_width_that_was_asked_for(seeing, kernel):
    "Half maximum of a star's profile, read off the pixels, after broadening"
    t = torch.arange(129.) - 64
    star = torch.exp(-4*math.log(2)*(t**2 + t[:,None]**2)/seeing**2)[None,None]
    line = blur(star, torch.tensor([kernel]))[0, 0, 64, 64:]
    i = int((line < line[0]/2).nonzero()[0])
    radius = i - 1 + float((line[i-1] - line[0]/2)/(line[i-1] - line[i]))
    assert abs(2*radius/math.hypot(seeing, kernel) - 1) < .05


def test_seeing_is_in_arcsec():
    "The same FWHM in arcsec blurs fine pixels more, in pixels"
    t = torch.arange(65.) - 32
    x = TensorGalaxy(torch.exp(-(t**2 + t[:,None]**2)/8).expand(2, 1, 65, 65).clone())
    x.pxscale = torch.tensor([.2, .8])
    torch.manual_seed(0)
    peaks = torch.stack([Seeing(2., p=1)(x, split_idx=0).amax((1, 2, 3)) for _ in range(30)]).mean(0).tolist()
    assert peaks[0] < .7*peaks[1], peaks


def test_distance_keeps_the_noise_of_the_survey():
    torch.manual_seed(0)
    x = TensorGalaxy(torch.randn(32, 3, 64, 64)*.2 + 1)
    y = GalaxyAugment(p=1, redshift=(.05, .2))(x, split_idx=0)
    (level, noise), (level0, noise0) = border_sky(y), border_sky(x)
    assert abs(float(level.mean() - level0.mean())) < .05 and abs(float(noise.mean()/noise0.mean()) - 1) < .25


@pytest.mark.parametrize('workers', [2])
def test_a_seed_repeats_augmented_batches_whatever_the_workers(tmp_path, workers):
    path = synth_galaxy10(tmp_path/'s.h5', n=60, size=32, seed=0, balance='uniform')
    def batches(n):
        seed_everything(5)
        dls = GalaxyDataLoaders.from_hdf5(path, size=32, bs=16, num_workers=n, progress=False, augment=lambda: [GalaxyAugment(), Seeing(2.), SkyNoise(.05)])
        return [b for b in dls.train]
    for (a, ya), (b, yb) in zip(batches(0), batches(workers), strict=True):
        assert torch.equal(a, b) and torch.equal(ya, yb)
        assert torch.equal(a.pxscale, b.pxscale)


def test_a_depth_means_the_same_noise_in_every_unit(tmp_path):
    rows = pd.read_csv(synth_fits(tmp_path, n=20, size=32, seed=0, balance='uniform'))
    def load(**settings):
        return GalaxyDataLoaders.from_fits(rows, tmp_path, size=32, augment=lambda: [SkyNoise(depth=20., p=1)], bs=4, settings=settings, progress=False, device='cpu')
    def noise(dls):
        "Relative to the brightest pixel of the first galaxy"
        t, = (f for f in dls.train.after_batch.fs if isinstance(f, SkyNoise))
        return float(t.most(torch.zeros(1), torch.tensor([dls.catalog.pxscale[0]])))/float(dls.galaxies.images[0].max())
    plain = noise(load())
    assert noise(load(unit='uJy')) == pytest.approx(plain, rel=1e-4) == noise(load(unit='MJy/sr'))
    for f in rows.file: fits.setval(tmp_path/f, 'BUNIT', value='adu')
    with pytest.raises(GalaxyDataError, match="unit of these galaxies is 'counts'; read them with zeropoint="): load(checksum=False)
    assert np.isfinite(noise(load(checksum=False, zeropoint=25.)))


@pytest.mark.parametrize('redshift', [.1, (.1,), (0, .1), (.1, .05), ('a', 1), (.1, math.nan)])
def test_redshifts_that_make_no_sense_are_one_sentence(redshift):
    with pytest.raises(GalaxyDataError, match='redshift') as e: GalaxyAugment(redshift=redshift)
    assert '\n' not in str(e.value)
