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
