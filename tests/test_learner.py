"""The recipe: repeatable, stable, and quiet."""
import subprocess, sys

import numpy as np, pytest, torch
from fastai.callback.mixup import CutMix, MixUp

from astroformer_astro.core import seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.learner import astroformer_learner, evaluate, load_astroformer_learner
from astroformer_astro.models.checkpoint import save_astroformer
from astroformer_astro.synth import synth_galaxy10


@pytest.fixture(scope='module')
def path(tmp_path_factory): return synth_galaxy10(tmp_path_factory.mktemp('l')/'s.h5', n=200, size=64, seed=0)


def fit(path, seed, epochs=1):
    seed_everything(seed)
    learn = astroformer_learner(GalaxyDataLoaders.from_hdf5(path, bs=32, progress=False), 'astroformer_nano')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn


def test_a_seed_repeats_training(path):
    a, b, c = (fit(path, s).model.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_saved_weights_predict_the_same(path, tmp_path):
    learn = fit(path, 0)
    save_astroformer(learn, tmp_path/'w')
    again = load_astroformer_learner(tmp_path/'w')
    g = learn.dls.galaxies.take(range(20))
    np.testing.assert_allclose(evaluate(again, g)['p'], evaluate(learn, g)['p'], atol=1e-5)


def test_it_learns_what_it_has_seen(path):
    "Thirty-two galaxies of two classes are learnt by heart: loss falls, nothing is frozen by mistake"
    seed_everything(0)
    dls = GalaxyDataLoaders.from_hdf5(path, progress=False)
    edge = dls.catalog.label.str.startswith('Edge-on') | dls.catalog.label.str.startswith('Round')
    few = dls.galaxies.take(np.flatnonzero(edge)[:40])
    learn = astroformer_learner(GalaxyDataLoaders.from_galaxies(few, bs=16, valid=range(8), augment=None), 'astroformer_nano', drop_path=0., label_smoothing=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(15)
    p, y = learn.get_preds(dl=learn.dls.train.new(shuffle=False, drop_last=False))
    assert (p.argmax(1) == y).float().mean() > .9


def test_it_runs_without_a_warning(path):
    code = ("import warnings; warnings.simplefilter('error')\n"
            "from astroformer_astro.all import *\n"
            f"dls = GalaxyDataLoaders.from_hdf5({str(path)!r}, progress=False)\n"
            "learn = astroformer_learner(dls, 'astroformer_nano')\n"
            "with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)\n")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'Warning' not in done.stderr


@pytest.mark.parametrize('mixed', [MixUp(.4), CutMix(1.)])
def test_mixing_galaxies_trains(tmp_path, mixed):
    dls = GalaxyDataLoaders.from_hdf5(synth_galaxy10(tmp_path/'m.h5', n=60, size=64, seed=0, balance='uniform'), bs=16, progress=False)
    learn = astroformer_learner(dls, 'astroformer_nano', cbs=mixed)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert all(np.isfinite(v) for v in learn.recorder.values[-1])
