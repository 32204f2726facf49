"""What a run leaves behind: one run's files and no other's, scores that nobody flattered, logs; and settings that cannot be meant."""
import json, os, re, sys, types

import numpy as np, pandas as pd, pytest, torch
from PIL import Image

from astroformer_astro.calibration import Scaling, calibrate, current_scaling, fit_conformal, fit_scaling, use_scaling
from astroformer_astro.cli import main
from astroformer_astro.core import GalaxyDataError
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.sky import cite_split, load_split
from astroformer_astro.job import Job, judge
from astroformer_astro.learner import astroformer_learner
from astroformer_astro.record import _cross_fitted, calibration_said, record_run, run_config, run_folder, run_loggers
from astroformer_astro.synth import galaxy10_classes, synth_arrays, synth_galaxy10


@pytest.fixture(scope='module')
def survey(tmp_path_factory): return synth_galaxy10(tmp_path_factory.mktemp('survey')/'a.h5', n=120, size=32, seed=0, balance='uniform')


def loaders(survey, **kwargs): return GalaxyDataLoaders.from_hdf5(survey, size=32, bs=32, progress=False, device='cpu', **kwargs)


@pytest.fixture(scope='module')
def learn(survey):
    learn = astroformer_learner(loaders(survey), 'astroformer_nano')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 4e-3)
    return learn


@pytest.fixture(scope='module')
def votes(tmp_path_factory):
    "A table of 60 galaxies with votes for two classes; one has no votes at all"
    folder = tmp_path_factory.mktemp('votes')
    sim, rng = synth_arrays(n=60, size=32, seed=1, balance='uniform'), np.random.default_rng(0)
    for k, img in enumerate(sim['images']): Image.fromarray(img).save(folder/f'{k}.png')
    smooth = np.where(['Smooth' in galaxy10_classes[a] for a in sim['ans']], .8, .3) + rng.uniform(-.1, .1, 60)
    table = pd.DataFrame(dict(file=[f'{k}.png' for k in range(60)], smooth=smooth*40, disc=(1 - smooth)*40))
    table.loc[7, ['smooth', 'disc']] = 0
    table.to_csv(folder/'t.csv', index=False)
    return folder/'t.csv'


def test_a_killed_process_leaves_nothing_that_stays(tmp_path):
    (tmp_path/f'.unfinished-{os.uname().nodename}-999999').mkdir()
    (tmp_path/f'.unfinished-{os.uname().nodename}-{os.getppid()}').mkdir()          # of a process that runs
    with run_folder(tmp_path) as new: (new/'a').touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f'.unfinished-{os.uname().nodename}-{os.getppid()}', 'a', 'files.json']


def test_a_list_of_files_removes_nothing_outside(tmp_path):
    (tmp_path/'mine').touch()
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'files.json').write_text(json.dumps(dict(sha256={'../mine': ''})))
    with run_folder(tmp_path/'run') as new: (new/'a').touch()
    assert (tmp_path/'mine').exists()


def test_a_second_record_leaves_no_file_of_the_first(learn, tmp_path):
    calibrate(learn, 'temperature', coverage=.8)
    record_run(learn, tmp_path)
    assert (tmp_path/'coverage.csv').exists() and json.loads((tmp_path/'galaxies.json').read_text())['calibration']['sets']['coverage'] == .8
    use_scaling(learn, None)
    record_run(learn, tmp_path, title='plain')
    assert not (tmp_path/'coverage.csv').exists() and not (tmp_path/'reliability.png').exists()
    card = (tmp_path/'model_card.md').read_text()
    assert card.startswith('# plain\n') and 'not calibrated' in card
    listed = json.loads((tmp_path/'files.json').read_text())['sha256']
    assert {p.name for p in tmp_path.iterdir()} == {*listed, 'files.json'}
    assert all(f'({p})' not in card or p in listed for p in re.findall(r'!\[\w+\]\((.*?)\)', card))


def test_the_split_of_a_record_is_the_one_that_was_used(learn, tmp_path):
    record_run(learn, tmp_path)
    split = load_split(tmp_path/'split.ecsv', learn.dls.catalog)
    assert split['valid'].tolist() == sorted(learn.dls.valid_ds.items) and split['train'].tolist() == sorted(learn.dls.train_ds.items)
    assert cite_split(tmp_path/'split.ecsv')[-16:] in (tmp_path/'model_card.md').read_text()
    said = pd.read_csv(tmp_path/'held_out.csv')
    assert said.row.tolist() == list(learn.dls.valid_ds.items) and (said.label == learn.dls.catalog.label.iloc[said.row].to_numpy()).all()


def test_no_galaxy_is_judged_by_itself():
    "Whatever the label of a galaxy is, its own probabilities and set stay what they are"
    rng = np.random.default_rng(0)
    x, y, fold = rng.normal(size=(60, 3)), rng.integers(0, 3, 60), np.arange(60) % 5
    scaling = Scaling('vector', sets=fit_conformal(np.full((9, 3), 1/3), np.arange(9) % 3, .8).to_dict())
    p, sets = _cross_fitted(x, y, scaling, fold)
    for i in range(3):
        other = y.copy(); other[i] = (y[i] + 1) % 3
        q, s = _cross_fitted(x, other, scaling, fold)
        assert np.array_equal(p[i], q[i]) and np.array_equal(sets[i], s[i])
        assert not np.array_equal(p[fold != fold[i]], q[fold != fold[i]])
    np.testing.assert_allclose(p[fold == 0], fit_scaling(x[fold != 0], y[fold != 0], 'vector')(torch.tensor(x[fold == 0])), rtol=1e-9)


def test_what_cannot_be_calibrated_is_said_not_to_be(learn, monkeypatch):
    def refuses(*args, **kwargs): raise GalaxyDataError('too few galaxies.')
    monkeypatch.setattr('astroformer_astro.job.calibrate', refuses)
    found, why = judge(Job(), learn)
    assert found.before is None and found.sets is None and current_scaling(learn) is None
    assert calibration_said(found, why).startswith('The probabilities are not calibrated: too few galaxies; take them')
    assert judge(Job(calibration='none'), learn)[1] == 'it was not asked for'


def test_sets_that_hold_every_class_as_often(learn):
    assert judge(Job(by_class=True), learn)[0].sets is not None
    assert len(current_scaling(learn).sets['thresholds']) == len(learn.dls.vocab)


def test_tensorboard_has_every_epoch(survey, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = astroformer_learner(loaders(survey), 'astroformer_nano', mixup=.2)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=run_loggers('tensorboard', tmp_path))
    events = EventAccumulator(str(next((tmp_path/'tensorboard').iterdir()))).Reload()
    assert [e.value for e in events.Scalars('balanced_accuracy')] == pytest.approx([v[3] for v in learn.curves.values])


def test_wandb_is_told_the_settings(monkeypatch, tmp_path):
    "Against a stand-in: the service itself is asked by nobody here"
    told = {}
    stand_in = types.ModuleType('wandb')
    stand_in.run, stand_in.init, stand_in.__spec__ = None, lambda **k: told.update(k), None
    monkeypatch.setitem(sys.modules, 'wandb', stand_in)
    monkeypatch.delitem(sys.modules, 'fastai.callback.wandb', raising=False)
    callback, = run_loggers('wandb', tmp_path, dict(recipe=dict(lr=torch.tensor(.5))))
    assert told['config'] == dict(recipe=dict(lr=.5)) and told['dir'] == str(tmp_path) and callback.name == 'wandb'
    sys.modules.pop('fastai.callback.wandb', None)


def test_wandb_itself_offline(survey, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    for k, v in dict(WANDB_MODE='offline', WANDB_SILENT='true').items(): monkeypatch.setenv(k, v)
    learn = astroformer_learner(loaders(survey), 'astroformer_nano')
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=run_loggers('wandb', tmp_path, run_config(learn)))
        assert wandb.run.summary['balanced_accuracy'] == pytest.approx(learn.curves.values[-1][3]) and wandb.run.config['recipe']['lr'] == 2e-3
    finally: wandb.finish()
    assert list(tmp_path.rglob('*.wandb'))


def test_a_log_that_is_not_installed_is_said(monkeypatch, survey, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert main(['train', '--data', str(survey), '--log', 'wandb', '--out', str(tmp_path/'no')]) == 2
    said = capsys.readouterr().err
    assert "pip install 'astroformer_astro[log]'" in said and said.count('\n') == 1 and not (tmp_path/'no').exists()


def test_votes_are_labels_of_the_command(votes, tmp_path, capsys):
    words = ['train', '--catalog', str(votes), '--y', 'smooth, disc', '--size', '32', '--epochs', '2', '--device', 'cpu', '--out', str(tmp_path/'run')]
    assert main(words) == 2 and 'the votes (smooth, disc) are all zero' in capsys.readouterr().err
    assert main([*words[:4], 'smooth,disk', *words[5:]]) == 2 and 'disk' in capsys.readouterr().err
    assert main([*words, '--bad', 'skip', '--log', 'tensorboard']) == 0
    run = tmp_path/'run'
    assert json.loads((run/'galaxies.json').read_text())['classes'] == ['smooth', 'disc']
    assert 'shares of votes' in (run/'model_card.md').read_text() and pd.read_csv(run/'skipped.csv').row.tolist() == [7]
    assert list((run/'tensorboard').glob('*/events*'))
    assert main(['predict', str(run/'galaxies'), str(votes), str(tmp_path/'out.csv'), '--device', 'cpu']) == 0
    out = pd.read_csv(tmp_path/'out.csv')
    np.testing.assert_allclose(out.p_smooth + out.p_disc, 1, atol=1e-5)


@pytest.mark.parametrize('settings', [dict(), dict(mixup=.4), dict(ema=.9, accumulate=2), dict(y=True, cutmix=.5)])
def test_lr_find_leaves_a_learner_as_it_was(survey, votes, settings, tmp_path):
    settings = dict(settings)
    dls = GalaxyDataLoaders.from_catalog(votes, size=32, bs=16, y=['smooth', 'disc'], bad='skip', progress=False, device='cpu') if settings.pop('y', False) else loaders(survey)
    learn = astroformer_learner(dls, 'astroformer_nano', **settings)
    learn.path = tmp_path
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): found = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7 < found.valley < 10 and learn.curves.values == []
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert len(learn.curves.values) == 1


@pytest.mark.parametrize('option, value, said', [
    ('device', 'gpu', "no device is called 'gpu'"), ('precision', 'fp8', "no precision is called 'fp8'"), ('calibration', 'magic', "no calibration is called 'magic'"),
    ('coverage', '1.5', 'coverage is 1.5'), ('log', 'paper', "no log is called 'paper'"), ('arch', 'resnet', "no network is called 'resnet'"), ('size', '8', 'size is 8'), ('epochs', '-1', 'epochs is -1'),
    ('split-seed', '-1', 'split_seed is -1'), ('bad', 'mend', 'raise or skip'), ('n', '7', 'n is 7'), ('y', 'kind', 'no catalogue'), ('recipe', 'best', "no recipe is called 'best'"),
    ('recipe', 'scratch_few lr=high', 'lr'), ('recipe', 'scratch_few mixup', 'no field'), ('recipe', 'scratch_few opt=adagrad', 'adamw, lamb, sgd'),
    ('recipe', 'scratch_few augment=turn', 'orientation'), ('recipe', 'scratch_few epochs=-3', 'epochs'), ('recipe', 'scratch_few bs', 'no field')])
def test_settings_that_cannot_be_meant(option, value, said, tmp_path, capsys):
    assert main(['train', '--out', str(tmp_path/'no'), f'--{option}', value]) == 2
    err = capsys.readouterr().err
    assert err.startswith('astroformer train: ') and said in err and err.count('\n') == 1
    assert not list(tmp_path.rglob('*.h5'))


@pytest.mark.parametrize('cases', ['nonsense', 'astroformer_nano 64', 'astroformer_nano 64 x', 'astroformer_nano 8 4', 'astroformer_nano 64 4,'])
def test_cases_of_the_bench_that_are_none(cases, capsys):
    assert main(['bench', 'model', '--cases', cases]) == 2
    err = capsys.readouterr().err
    assert 'is no case' in err and err.count('\n') == 1
