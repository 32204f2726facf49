"""Workers, pickles and turns: what the data notebooks do not show on a page."""
import pickle

from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.learner import load_learner
from hypothesis import given, settings, strategies as st

from astroformer_astro.core import GalaxyDataError, seed_everything
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


def pictures(folder, **columns):
    "A table of 40 pictures"
    for i in range(40): Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)).save(folder/f'{i}.png')
    return pd.DataFrame(dict(file=[f'{i}.png' for i in range(40)])).assign(**columns)


@pytest.mark.parametrize('gap', [False, True])
def test_numbers_are_names_where_the_names_are_given(gap, tmp_path):
    table = pictures(tmp_path, label=np.arange(40) % 3)
    if gap: table = table.astype(dict(label=float)).assign(label=lambda t: t.label.mask(t.index == 5))
    load = lambda classes: GalaxyDataLoaders.from_catalog(table, tmp_path, size=32, bad='skip', classes=classes, progress=False, device='cpu')
    with pytest.warns(UserWarning, match="0 is 'spiral', 1 is 'elliptical', 2 is 'merger'"): dls = load(['spiral', 'elliptical', 'merger'])
    assert dls.classes == ('spiral', 'elliptical', 'merger') and dls.catalog.label[:3].tolist() == ['spiral', 'elliptical', 'merger']
    assert dls.test_dl(table[:3], with_labels=True).one_batch()[1].tolist() == [0, 1, 2]
    with pytest.raises(GalaxyDataError, match='numbers 0 to 2.*2 names.*counted from 0'): load(['spiral', 'elliptical'])
    assert load([2, 0, 1]).classes == ('2', '0', '1') and load(None).test_dl(table[:3], with_labels=True).one_batch()[1].tolist() == [0, 1, 2]


def test_classes_that_differ_only_in_case_are_listed(tmp_path, capsys):
    dls = GalaxyDataLoaders.from_catalog(pictures(tmp_path, label=['Spiral', 'spiral ', ' spiral', 'merger']*10), tmp_path, size=32, progress=False, device='cpu')
    dls.summary()
    assert "'Spiral' and 'spiral' differ only in case or blanks" in capsys.readouterr().out and dls.classes == ('Spiral', 'merger', 'spiral')


def test_a_column_of_names_is_not_taken_for_classes(tmp_path):
    table = pictures(tmp_path, id=[f'NGC {i}' for i in range(40)])
    with pytest.raises(GalaxyDataError, match="column 'id' has 40 different values in 40 rows .NGC 0, NGC 1, NGC 10, NGC 11, NGC 12, ....") as e:
        GalaxyDataLoaders.from_catalog(table, tmp_path, y='id', size=32, progress=False)
    assert len(str(e.value)) < 250


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
