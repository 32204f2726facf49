"""Kills, full disks and two processes: what the notebook on survival does not show on a page."""
import json, os, subprocess, sys, tempfile
from pathlib import Path

import pytest, torch

from astroformer_astro.synth import synth_galaxy10

root = Path(__file__).parent.parent

# One process imports; each life of a training is a child of it that starts from nothing but the file that was left
program = '''
import json, os, random, signal, sys, warnings
warnings.filterwarnings('ignore')
signal.signal(signal.SIGINT, signal.default_int_handler)          # a shell's background jobs ignore it
import torch
torch.use_deterministic_algorithms(True); torch.set_num_threads(1)
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import *
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import params
from astroformer_astro.core import seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.survive import Checkpoint, survive
from timm.utils import ModelEmaV3

class Mean(Callback):
    "A running mean of the weights, which is what is kept in the end"
    def before_fit(self): self.mean = ModelEmaV3(self.model, decay=.9)
    def after_step(self): self.mean.update(self.model)
    def after_fit(self): self.model.load_state_dict(self.mean.module.state_dict())

class Kill(Callback):
    "kill -9, after a number of forward passes, of training or of validation, or in the middle of writing"
    order = 200
    def __init__(self, after, writing): self.left, self.writing = after, writing
    def after_pred(self):
        self.left -= 1
        if self.left: return
        if not self.writing: os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = lambda f: os.kill(os.getpid(), signal.SIGKILL)

class CtrlC(Callback):
    "SIGINT after a number of forward passes, of training or of validation"
    order = 200
    def __init__(self, after): self.left = after
    def after_pred(self):
        self.left -= 1
        if not self.left: os.kill(os.getpid(), signal.SIGINT)

def train(path, out, how, workers=0, cbs=()):
    seed_everything(3)
    dls = GalaxyDataLoaders.from_hdf5(path, size=32, bs=16, num_workers=workers, progress=False, device='cpu')
    model = astroformer('astroformer_nano', img_size=32, classes=len(dls.vocab), drop_path=.3)
    learn = Learner(dls, model, CrossEntropyLossFlat(), splitter=lambda m: [params(m.stem) + params(m.stages), params(m.head)], wd=.05)
    cbs = [GradientClip(), *cbs]
    if how == 'all at once': cbs += [Mean(), MixUp(.4), GradientAccumulation(24)]
    with learn.no_bar(), learn.no_logging():
        if how == 'fine_tune': learn.fine_tune(2, freeze_epochs=2, cbs=cbs)
        else: learn.fit_one_cycle(4, 2e-3, cbs=cbs)
    torch.save([learn.model.state_dict(), learn.recorder.values, torch.stack(list(learn.recorder.losses))], out)

def child(*args, **kwargs):
    "The status of a process that trains"
    sys.stdout.flush()
    if pid := os.fork(): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try: train(*args, **kwargs); sys.stdout.flush(); os._exit(0)
    except BaseException:
        import traceback; traceback.print_exc(); os._exit(1)

def lives(path, folder, how, kills, seed):
    "Train until a life is not cut short; the statuses of all"
    draw, statuses = random.Random(seed), []
    for _ in range(kills): statuses.append(child(path, f'{folder}/end.pt', how, cbs=[*survive(folder, resume=True), Kill(draw.randint(1, 8), draw.random() < .3)]))
    return statuses + [child(path, f'{folder}/end.pt', how, cbs=survive(folder, resume=True))]
'''


def run(code, **kwargs):
    "The last line that a program prints, as JSON"
    p = subprocess.run([sys.executable, '-c', program + code], capture_output=True, text=True, cwd=root, env=os.environ | dict(OMP_NUM_THREADS='1') | kwargs)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.strip().split('\n')[-1]), p.stderr


@pytest.fixture(scope='module')
def survey(tmp_path_factory): return synth_galaxy10(tmp_path_factory.mktemp('s')/'s.h5', n=60, size=64, seed=0, balance='uniform')


def same(a, b):
    (m, values, losses), (n, values2, losses2) = (torch.load(p, weights_only=False) for p in (a, b))
    assert m.keys() == n.keys()
    return all(torch.equal(m[k], n[k]) for k in m) and list(map(list, values)) == list(map(list, values2)) and torch.equal(losses, losses2)


def killed(survey, folder, hows, kills, seed):
    "Undisturbed and killed trainings of each kind, `peace.pt` and `end.pt`; how the lives of each ended"
    code = f'''
statuses = {{}}
for how in {hows}:
    os.makedirs(f'{folder}/{{how}}')
    assert child('{survey}', f'{folder}/{{how}}/peace.pt', how) == 0
    statuses[how] = lives('{survey}', f'{folder}/{{how}}', how, {kills}, {seed})
print(json.dumps(statuses))'''
    return run(code)[0]


def check(folder, how, kills, statuses):
    *before, last = statuses
    assert before.count(-9) >= min(2, kills) and set(before) <= {-9, 0} and last == 0, statuses
    assert same(folder/how/'peace.pt', folder/how/'end.pt')


@pytest.fixture(scope='module')
def twice(survey, tmp_path_factory):
    "Trainings that were killed twice"
    folder = tmp_path_factory.mktemp('twice')
    return folder, killed(survey, folder, ('fine_tune', 'all at once'), 2, seed=0)


@pytest.mark.parametrize('how', ['fine_tune', 'all at once'])
def test_two_kills_leave_no_trace(twice, how): check(twice[0], how, 2, twice[1][how])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_ten_kills_leave_no_trace(survey, tmp_path, seed):
    hows = 'one_cycle', 'fine_tune', 'all at once'
    statuses = killed(survey, tmp_path, hows, 10, seed + 1)
    for how in hows: check(tmp_path, how, 10, statuses[how])


@pytest.mark.parametrize('how', ['fine_tune', 'all at once'])
def test_ctrl_c_leaves_no_trace(survey, twice, tmp_path, how):
    "Stopped in the first, the second and the last batch of an epoch and in its validation, and each time taken up where it was"
    code = f'''
from astroformer_astro.record import run_loggers
places = []
def life(after):
    if after: more = [CtrlC(after)]
    else: more = [*run_loggers('tensorboard', '{tmp_path}')] if '{how}' == 'fine_tune' else []
    return child('{survey}', '{tmp_path}/end.pt', '{how}', cbs=[*survive('{tmp_path}', resume=True), *more])
statuses = []
for after in (1, 1, 4, 2, 0):
    statuses.append(life(after))
    state = torch.load('{tmp_path}/checkpoint.pt', weights_only=True)
    places.append([state['fit'], state['epoch'], state['train_iter'], bool(state['place']), state['ended']])
print(json.dumps([statuses, places]))'''
    (statuses, places), said = run(code)
    assert statuses == [1, 1, 1, 1, 0] and said.count('KeyboardInterrupt') >= 4
    ends = [0, 2, 6, False, True] if how == 'fine_tune' else [0, 2, 6, False, False]                  # in the validation after six steps
    assert places[:4] == [[0, 0, 1, True, False], [0, 0, 2, True, False], [0, 1, 5, True, False], ends], places      # none was learnt twice
    assert same(twice[0]/how/'peace.pt', tmp_path/'end.pt')


def test_a_seed_decides_whatever_loads(survey, twice, tmp_path):
    "The same weights in two processes, with no workers and with two, and killed with two"
    code = f'''
statuses = [child('{survey}', '{tmp_path}/b.pt', 'all at once', workers=2, cbs=[Checkpoint('{tmp_path}', resume=True), *cbs]) for cbs in ([Kill(6, False)], [])]
print(json.dumps(statuses))'''
    assert run(code)[0] == [-9, 0]
    assert same(twice[0]/'all at once'/'peace.pt', tmp_path/'b.pt')


def test_a_disk_with_little_room(survey, tmp_path):
    "The system itself refuses the second file: training goes on, and the first is whole. A folder that cannot be is said before training"
    (tmp_path/'file').write_text('')
    code = f'''
from astroformer_astro.core import GalaxyDataError
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
class Fill(Callback):
    order = 300
    def before_train(self): resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    def after_fit(self): resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
warnings.simplefilter('always')
train('{survey}', '{tmp_path}/end.pt', 'one_cycle', cbs=[Checkpoint('{tmp_path}/run'), Fill()])
state = torch.load('{tmp_path}/run/checkpoint.pt', weights_only=True)
try: train('{survey}', '{tmp_path}/no.pt', 'one_cycle', cbs=survive('{tmp_path}/file'))
except GalaxyDataError as e: print(json.dumps([state['epoch'], os.listdir('{tmp_path}/run'), str(e)]))'''
    (epoch, names, said), err = run(code)
    assert epoch == 0 and names == ['checkpoint.pt'] and (tmp_path/'end.pt').exists()
    assert err.count('cannot be written (File too large)') == 4 and 'still that of fit 1, epoch 1' in err
    assert said.startswith(f'{tmp_path}/file/checkpoint.pt cannot be written (') and said.endswith('; choose a folder you may write to.')


def test_a_folder_that_may_no_longer_be_written(survey):
    "Its permission is taken away after the first file, and root, whom permissions do not bind, becomes nobody: the file is left whole, and training goes on"
    folder = tempfile.mkdtemp()                          # that of pytest is closed to nobody
    code = f'''
root = os.getuid() == 0
def forbid():
    os.chmod('{folder}', 0o555)
    if root: os.seteuid(65534)
def allow():
    if root: os.seteuid(0)
    os.chmod('{folder}', 0o755)
class Forbid(Callback):
    order = Checkpoint.order - 1
    def before_train(self):
        if self.epoch: forbid()
    def after_fit(self): forbid()
class Allow(Callback):
    order = Checkpoint.order + 1
    def before_train(self): allow()
    def after_fit(self): allow()
warnings.simplefilter('always')
train('{survey}', '{folder}/end.pt', 'one_cycle', cbs=[Forbid(), Checkpoint('{folder}'), Allow()])
state = torch.load('{folder}/checkpoint.pt', weights_only=True)
print(json.dumps([state['epoch'], sorted(os.listdir('{folder}'))]))'''
    (epoch, names), err = run(code)
    assert epoch == 0 and names == ['checkpoint.pt', 'end.pt']
    assert err.count('cannot be written (Permission denied)') == 4 and 'still that of fit 1, epoch 1' in err


def test_what_may_follow_ctrl_c_in_the_same_process(survey, tmp_path):
    "With MixUp: the loss is put back, another look at the galaxies leaves the file alone, and the same call goes on to the same end"
    code = f'''
def learner():
    seed_everything(3)
    dls = GalaxyDataLoaders.from_hdf5('{survey}', size=32, bs=16, progress=False, device='cpu')
    return Learner(dls, astroformer('astroformer_nano', img_size=32, classes=len(dls.vocab)), CrossEntropyLossFlat())
def fit(learn, *cbs):
    seed_everything(4)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 2e-3, cbs=[MixUp(.4), *cbs])
def weights(learn): return torch.cat([t.flatten().double() for t in learn.model.state_dict().values()])
peace, stopped = learner(), learner()
fit(peace)
stopped.add_cb(Checkpoint('{tmp_path}', resume=True))
before = stopped.loss_func
try: fit(stopped, CtrlC(2))
except KeyboardInterrupt: pass
kept = open('{tmp_path}/checkpoint.pt', 'rb').read()
with stopped.no_bar(), stopped.no_logging(): stopped.validate()
same = [stopped.loss_func is before, open('{tmp_path}/checkpoint.pt', 'rb').read() == kept]
fit(stopped)
print(json.dumps(same + [torch.equal(weights(stopped), weights(peace))]))'''
    assert run(code)[0] == [True, True, True]


def test_memory_that_runs_out_after_ctrl_c_has_the_epoch_begin_anew(survey, tmp_path):
    code = f'''
class Full(Callback):
    "A batch of sixteen is too many for the memory"
    def after_pred(self):
        if self.training and len(self.x) == 16: raise torch.OutOfMemoryError('out of memory')
out = '{tmp_path}'
codes = [child('{survey}', out + '/end.pt', 'one_cycle', cbs=[*survive(out, resume=True), CtrlC(2)])]
codes.append(child('{survey}', out + '/end.pt', 'one_cycle', cbs=[*survive(out, resume=True), Full()]))
state = torch.load(out + '/checkpoint.pt', weights_only=True)
print(json.dumps(codes + [state['train_iter'], len(state['callbacks']['recorder']['values']['losses'])]))'''
    assert run(code)[0] == [1, 0, 24, 24]               # six smaller batches in each of four epochs


def test_memory_that_runs_out_in_one_of_several_processes_stops_them(survey, tmp_path):
    "Another batch size in one process alone would leave the others waiting"
    code = f'''
from astroformer_astro import survive as module
from astroformer_astro.core import GalaxyDataError
class Full(Callback):
    def after_pred(self): raise torch.OutOfMemoryError('out of memory')
module.num_distrib, module.rank_distrib = (lambda: 2), (lambda: 1)
learn = Learner(GalaxyDataLoaders.from_hdf5('{survey}', size=32, bs=16, progress=False, device='cpu'), astroformer('astroformer_nano', img_size=32), CrossEntropyLossFlat())
try:
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[module.MemoryGuard(), Full()])
except GalaxyDataError as e: print(json.dumps(str(e)))'''
    assert run(code)[0] == '16 galaxies at a time do not fit into the memory of process 1; give a smaller bs.'
