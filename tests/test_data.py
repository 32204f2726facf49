"""Workers, pickles and turns: what the data notebooks do not show on a page."""
import pickle

from pathlib import Path

import numpy as np, pytest, torch
from fastai.learner import load_learner
from hypothesis import given, settings, strategies as st

from astroformer_astro.core import seed_everything
from astroformer_astro.data.augment import GalaxyAugment, dihedral
from astroformer_astro.data.block import CutoutReader, GalaxyDataLoaders
from astroformer_astro.data.tensor import TensorGalaxy
from astroformer_astro.data.hdf5 import read_hdf5
from astroformer_astro.learner import astroformer_learner
from astroformer_astro.synth import synth_galaxy10


@pytest.fixture(scope='module')
def path(tmp_path_factory): return synth_galaxy10(tmp_path_factory.mktemp('d')/'s.h5', n=80, size=64, seed=0)


def test_workers_give_the_same_galaxies(path):
    alone, helped = (GalaxyDataLoaders.from_hdf5(path, bs=8, num_workers=n, progress=False) for n in (0, 2))
    for (a, ya), (b, yb) in zip(alone.valid, helped.valid):
        assert torch.equal(a, b) and torch.equal(ya, yb)


def test_reader_survives_pickling(path):
    dls = GalaxyDataLoaders.from_hdf5(path, progress=False)
    reader = pickle.loads(pickle.dumps(CutoutReader(dls.galaxies)))
    assert np.array_equal(reader(3).permute(1, 2, 0).numpy(), dls.galaxies.images[3])


def test_a_seed_repeats_training_batches(path):
    def batch():
        seed_everything(5)
        return GalaxyDataLoaders.from_hdf5(path, bs=8, progress=False).one_batch()
    (a, ya), (b, yb) = batch(), batch()
    assert torch.equal(a, b) and torch.equal(ya, yb)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(0, 7))
def test_dihedral_is_a_group(i, j):
    "Any two orientations after each other are one of the eight, and each has an inverse"
    x = torch.rand(1, 2, 5, 5)
    turn = lambda t, k: dihedral(t, torch.tensor([k]))
    assert any(torch.equal(turn(turn(x, i), j), turn(x, k)) for k in range(8))
    assert any(torch.equal(turn(turn(x, i), k), x) for k in range(8))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([32, 45, 64]), st.integers(1, 5))
def test_augmentation_keeps_shape_range_and_type(seed, size, bands):
    torch.manual_seed(seed)
    x = TensorGalaxy(torch.rand(4, bands, size, size))
    y = GalaxyAugment()(x, split_idx=0)
    assert type(y) is TensorGalaxy and y.shape == x.shape and y.dtype == x.dtype
    assert y.isfinite().all() and y.min() >= -1e-5 and y.max() <= 1 + 1e-5


def test_rotation_keeps_the_light_of_a_centred_galaxy():
    r2 = sum(t**2 for t in torch.meshgrid(torch.arange(65.) - 32, torch.arange(65.) - 32, indexing='ij'))
    x = TensorGalaxy(torch.exp(-r2/2/8**2).expand(32, 1, 65, 65))
    torch.manual_seed(0)
    y = GalaxyAugment(p=1, shift=0, zoom=0)(x, split_idx=0)
    torch.testing.assert_close(y.sum((1, 2, 3)), x.sum((1, 2, 3)), rtol=.01, atol=0)


def test_the_sample_that_comes_along():
    g = read_hdf5(Path(__file__).parents[1]/'data'/'sample.h5', progress=False)
    assert g.images.shape == (30, 64, 64, 3) and set(g.catalog.label.value_counts()) == {3}


def test_an_exported_learner_predicts_and_holds_no_galaxies(tmp_path):
    dls = GalaxyDataLoaders.from_hdf5(synth_galaxy10(tmp_path/'many.h5', n=400, size=64, seed=0), progress=False)
    learn = astroformer_learner(dls, 'astroformer_nano')
    learn.path = tmp_path
    galaxy = dls.galaxies.images[7]
    before = learn.predict(galaxy)[2]
    learn.export('learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    assert torch.allclose(again.predict(galaxy)[2], before, atol=1e-5)
    assert list(again.dls.classes) == list(dls.classes) and again.dls.size == 64
    weights = sum(p.numel()*4 for p in learn.model.parameters())
    assert (tmp_path/'learn.pkl').stat().st_size < 1.5*weights + 1e6 < dls.galaxies.images.nbytes + weights
