"What a checkpoint has to tell apart, and what it has to bring back"
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback

from astroformer_astro.core import GalaxyDataError, seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.images import GalaxySet
from astroformer_astro.learner import astroformer_learner
from astroformer_astro.record import batches_said, curve_table, run_config
from astroformer_astro.survive import survive
from astroformer_astro.synth import synth_arrays


class Interrupt(Callback):
    order = 200
    def before_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt


def trained(folder, cbs=(), resume=False, **settings):
    seed_everything(0)
    galaxies = GalaxySet(synth_arrays(30, 32, balance='uniform')['images'], pd.DataFrame(dict(label=list('abc')*10)), ('a', 'b', 'c'))
    learn = astroformer_learner(GalaxyDataLoaders.from_galaxies(galaxies, bs=8, augment=None), 'astroformer_nano', **settings)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-3, cbs=[*survive(folder, resume), *cbs])
    return learn


def test_curves_of_a_training_that_had_ended_come_back(tmp_path):
    first = curve_table(trained(tmp_path))
    pd.testing.assert_frame_equal(curve_table(trained(tmp_path, resume=True)), first)


@pytest.mark.parametrize('other', [dict(label_smoothing=.3), dict(weight_power=0.), dict(mixup=0.), dict(confusion=np.roll(np.eye(3), 1, 0))],
                         ids=lambda o: ', '.join(o))
def test_a_training_goes_on_by_its_own_recipe_alone(tmp_path, other):
    own = dict(mixup=.2, ema=.9)
    with pytest.raises(KeyboardInterrupt): trained(tmp_path, [Interrupt()], **own)
    with pytest.raises(GalaxyDataError, match='of another training'): trained(tmp_path, resume=True, **own | other)
    trained(tmp_path, resume=True, **own)


class Tight(Callback):
    "Memory for four galaxies at a time; and an end in the second epoch"
    def before_batch(self):
        if self.training and len(self.x) > 4: raise torch.OutOfMemoryError('CUDA out of memory.')
        if self.epoch == 1: raise KeyboardInterrupt


def test_batches_that_were_halved_stay_so_and_are_said(tmp_path):
    with pytest.raises(KeyboardInterrupt): trained(tmp_path, [Tight()])
    learn = trained(tmp_path, resume=True)
    assert batches_said(learn) == '4 galaxies at a time, 8 a step of the optimiser'
    config = run_config(learn)
    assert (config['batch'], config['galaxies_a_step']) == (4, 8)
    assert batches_said(trained(tmp_path/'roomy')) == '8 galaxies at a time'


def test_a_training_of_before_recipes_had_names_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt): trained(tmp_path, [Interrupt()])
    state = torch.load(tmp_path/'checkpoint.pt', weights_only=True)
    assert not any('base' in line for run in state['runs'] for line in run['recipe'])
