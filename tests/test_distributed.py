"""Two processes on the CPU, talking through gloo: the same training as one, and every galaxy once."""
import json, os, subprocess, sys, textwrap
from pathlib import Path

import numpy as np, pandas as pd, pytest

from astroformer_astro.cli import main
from astroformer_astro.synth import synth_galaxy10

pytest.importorskip('accelerate')
env = os.environ | dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
# `accelerate launch --cpu` starts a single process unless there is MPI; what it starts on GPUs is this launcher
launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv-backend', 'c10d', '--rdzv-endpoint', 'localhost:0']

# 61 galaxies are trained on and 19 held out, so that the last batches are torn; nothing is drawn at random, so that one process and two can be the same
script = textwrap.dedent('''
    import json, os, sys
    import torch
    from astroformer_astro.core import seed_everything
    from astroformer_astro.data.block import GalaxyDataLoaders
    from astroformer_astro.learner import astroformer_learner
    from astroformer_astro.parallel import data_parallel
    from astroformer_astro.survive import survive
    from fastai.callback.core import Callback

    path, out = sys.argv[1:]
    class Trace(Callback):
        def before_fit(self): self.losses, self.rows, self.draws = [], [], []
        def before_train(self): self.draws.append(torch.rand(1).item())
        def after_batch(self):
            if self.training: self.losses.append(self.learn.loss.item()); self.rows += self.dl._DataLoader__idxs[self.iter*self.dl.bs:(self.iter + 1)*self.dl.bs]
    Trace.order = 60

    def trained(cbs=(), **settings):
        seed_everything(0)
        dls = GalaxyDataLoaders.from_hdf5(path, size=32, bs=16, valid=range(19), augment=None, progress=False, device='cpu')
        learn = astroformer_learner(dls, 'astroformer_nano', drop_path=0., **settings)
        with learn.no_bar(), learn.no_logging(), data_parallel(learn):
            learn.fit_one_cycle(2, 2e-3, cbs=[trace := Trace(), *cbs])
            p, y = learn.get_preds()
        weights = torch.cat([v.flatten().double() for v in learn.model.state_dict().values()])
        return dict(losses=trace.losses, order=trace.rows, draws=trace.draws, values=[list(v) for v in learn.recorder.values], p=p.tolist(), y=y.tolist(), weights=weights.tolist(), keys=list(learn.model.state_dict()),
                    norm=type(learn.model.stages[0][0].norm1).__name__, smooth=[float(l) for l in learn.recorder.losses])

    found = dict(plain=trained(), accumulated=trained(accumulate=2, ema=.9, clip=.5))
    if len(sys.argv) == 3: json.dump(found, open(f"{out}.{os.environ.get('RANK', 'alone')}", 'w'))
''')


@pytest.fixture(scope='module')
def survey(tmp_path_factory): return synth_galaxy10(tmp_path_factory.mktemp('s')/'s.h5', n=80, size=32, seed=0, balance='uniform')


@pytest.fixture(scope='module')
def runs(survey, tmp_path_factory):
    "What the script found alone, and as each of two processes"
    folder = tmp_path_factory.mktemp('runs')
    (folder/'script.py').write_text(script)
    for words in ([sys.executable], launch):
        done = subprocess.run([*words, folder/'script.py', survey, folder/'out'], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return {k: json.loads((folder/f'out.{k}').read_text()) for k in ('alone', '0', '1')}


def test_two_processes_train_as_one(runs):
    for kind in 'plain', 'accumulated':
        alone, first, second = (runs[k][kind] for k in ('alone', '0', '1'))
        np.testing.assert_allclose(np.mean([first['losses'], second['losses']], 0), alone['losses'], rtol=2e-4)
        np.testing.assert_allclose(first['smooth'], alone['smooth'], rtol=2e-4)
        np.testing.assert_allclose(first['weights'], alone['weights'], atol=2e-4)
        assert first['weights'] == second['weights'] and len(alone['losses']) == 6


def test_a_batch_is_the_same_galaxies(runs):
    alone, first, second = (np.array(runs[k]['plain']['order']).reshape(6, -1) for k in ('alone', '0', '1'))
    assert first.shape == second.shape == (6, 8)
    np.testing.assert_array_equal(np.hstack([first, second]), alone)


def test_scores_are_of_every_galaxy_once(runs):
    for kind in 'plain', 'accumulated':
        alone, *two = (runs[k][kind] for k in ('alone', '0', '1'))
        for one in two:
            assert one['y'] == alone['y'] and len(one['y']) == 19                       # in order, though 19 is odd
            np.testing.assert_allclose(one['p'], alone['p'], atol=1e-4)
            np.testing.assert_allclose(one['values'], alone['values'], rtol=2e-4)


def test_the_network_comes_back_as_it_was(runs):
    for k in '0', '1':
        assert runs[k]['plain']['keys'] == runs['alone']['plain']['keys'] and runs[k]['plain']['norm'] == 'BatchNormAct2d'


def test_processes_draw_for_themselves(runs):
    assert not set(runs['0']['plain']['draws']) & set(runs['1']['plain']['draws'])


# as a user would, on as many processes as a machine without GPUs lets accelerate start
accelerate = [str(Path(sys.executable).parent/'accelerate'), 'launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--main_process_port', '0', '-m', 'astroformer_astro.cli']


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
    "Folders of the same command, alone and in two processes; and what the two said"
    folder = tmp_path_factory.mktemp('commands')
    survey = synth_galaxy10(folder/'s.h5', n=120, size=32, seed=0, balance='uniform')       # 95 to train on: one batch of 64, which two processes can halve
    words = ['train', '--data', str(survey), '--size', '32', '--epochs', '2', '--device', 'cpu', '--recipe', 'scratch_few augment=none drop_path=0 ema=.9', '--out']
    assert main([*words, str(folder/'one')]) == 0
    done = subprocess.run([*accelerate, *words, str(folder/'two')], capture_output=True, text=True, env=env | dict(ACCELERATE_USE_CPU='false'), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder/'one', folder/'two', done.stdout


def test_the_command_trains_in_two_processes_as_in_one(commands):
    one, two, _ = commands
    np.testing.assert_allclose(pd.read_csv(two/'curves.csv'), pd.read_csv(one/'curves.csv'), rtol=1e-4)
    a, b = (pd.read_csv(d/'held_out.csv') for d in (one, two))
    assert a.row.tolist() == b.row.tolist() and not a.row.duplicated().any()
    columns = [c for c in a if c.startswith('p_')]
    np.testing.assert_allclose(b[columns], a[columns], atol=1e-4)


def test_a_probe_in_two_processes_is_that_of_one(commands):
    one, two, _ = commands
    words = ['train', '--data', str(one.parent/'s.h5'), '--size', '32', '--device', 'cpu', '--pretrained', str(one/'galaxies.safetensors'), '--recipe', 'linear_probe', '--out']
    assert main([*words, str(one.parent/'probe1')]) == 0
    done = subprocess.run([*accelerate, *words, str(one.parent/'probe2')], capture_output=True, text=True, env=env | dict(ACCELERATE_USE_CPU='false'), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (pd.read_csv(one.parent/d/'held_out.csv') for d in ('probe1', 'probe2'))
    columns = [c for c in a if c.startswith('p_')]
    np.testing.assert_allclose(b[columns], a[columns], atol=.01)            # the regression stops within its tolerance


def test_only_the_first_process_writes_and_speaks(commands):
    one, two, said = commands
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()} == {*json.loads((two/'files.json').read_text())['sha256'], 'files.json'}
    assert said.count('epoch 2/2') == said.count('on CPU') == said.count('done: open') == 1
    assert json.loads((two/'environment.json').read_text())['processes'] == 2


def test_other_verbs_are_not_shared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert main(['synth', str(tmp_path/'a.h5')]) == 2 and 'can only train' in capsys.readouterr().err and not list(tmp_path.iterdir())
