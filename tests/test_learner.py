"""The recipe: repeatable, stable, quiet, and every word of it carried out."""
import dataclasses, platform, subprocess, sys, tempfile

import numpy as np, pandas as pd, pytest, timm, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from astroformer_astro.core import GalaxyDataError, seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.learner import astroformer_learner, class_weights, evaluate, load_astroformer_learner
from astroformer_astro.models.astroformer import astroformer
from astroformer_astro.models.checkpoint import load_astroformer, save_astroformer
from astroformer_astro.recipe import GalaxyLoss, Recipe, RunningMean, name_and_fields, recipe, recipes, training_stages
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


# each word of a recipe, against what is worked out by hand

@pytest.fixture(scope='module')
def galaxies(path): return GalaxyDataLoaders.from_hdf5(path, size=32, progress=False).galaxies


def tiny(galaxies, n=40, bs=16, seed=0, recipe='scratch_few', **settings):
    "A linear network on the first galaxies, eight of them held out, in an order that the seed decides"
    seed_everything(seed)
    dls = GalaxyDataLoaders.from_galaxies(galaxies.take(range(n)), bs=bs, valid=range(8), augment=None, device='cpu')
    return astroformer_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, len(dls.vocab))), recipe=recipe, **settings)


def quietly(learn, f):
    with learn.no_bar(), learn.no_logging(): f(learn)
    return learn


def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


@pytest.mark.parametrize('f', [f for f in dataclasses.fields(Recipe) if f.name != 'base'], ids=lambda f: f.name)       # which is the name before them
def test_every_field_can_be_written_in_the_shell(f):
    value = {bool: True, int: 3, float: .25, str: dict(schedule='flat_cos', unfreeze='one_by_one', opt='sgd').get(f.name, 'sky')}[f.type]
    name, fields = name_and_fields(f'finetune {f.name}={value}')
    assert getattr(recipe(name, **fields), f.name) == value and type(fields[f.name]) is f.type


@pytest.mark.parametrize('opt', ['adamw', 'lamb', 'sgd'])
def test_decay_spares_norms_biases_and_offset_kernels(path, opt):
    "One step without a gradient: decay alone moves a weight, by lr times wd of it"
    learn = astroformer_learner(GalaxyDataLoaders.from_hdf5(path, size=32, progress=False, device='cpu'), 'astroformer_nano', opt=opt, wd=.1)
    learn.create_opt(); learn.opt.set_hypers(lr=.5, wd=learn.wd)                 # as every fit does
    before = {}
    for name, p in learn.model.named_parameters(): p.grad = torch.zeros_like(p); p.data += .1; before[name] = p.detach().clone()
    learn.opt.step()
    for name, p in learn.model.named_parameters():
        spared = p.ndim == 1 or name.endswith('rel_pos.bias')
        assert torch.allclose(p, before[name]*(1 if spared else 1 - .5*.1), atol=1e-7), name


def test_a_running_mean_is_that_of_the_steps():
    "timm's memory grows with the step, 1 - step^(-2/3), up to the decay of the recipe"
    class Climb(Callback):
        def after_step(self): self.learn.model.weight.data += 1
    learn = Learner(DataLoaders(*[[(torch.zeros(1, 1), torch.zeros(1, 1))]*20]*2), nn.Linear(1, 1), nn.functional.mse_loss, lr=0., cbs=[Climb(), RunningMean(.6)])
    value = learn.model.weight.item()
    quietly(learn, lambda l: l.fit(1))
    mean = value
    for step in range(20):
        value += 1
        memory = min(.6, 1 - step**(-2/3)) if step > 1 else 0
        mean = memory*mean + (1 - memory)*value
    assert learn.model.weight.item() == pytest.approx(mean, abs=1e-4) and mean < value - 1


def test_accumulated_batches_make_the_step_of_a_larger_one(galaxies):
    fields = dict(opt='sgd', clip=0, weight_power=0, wd=0)
    whole, halves = (quietly(tiny(galaxies, bs=bs, accumulate=n, **fields), lambda l: l.fit(2, .01)) for bs, n in ((16, 1), (8, 2)))
    assert len(halves.recorder.losses) == 2*len(whole.recorder.losses) and torch.allclose(weights(whole), weights(halves), atol=1e-6)


def test_gradients_are_clipped(galaxies):
    class Norms(Callback):
        def after_step(self): norms.append(nn.utils.get_total_norm([p.grad for p in self.model.parameters()]).item())
    for clip, most in ((.01, .01), (0, np.inf)):
        norms = []
        quietly(tiny(galaxies, clip=clip, cbs=Norms()), lambda l: l.fit(1))
        assert norms == pytest.approx([.01]*len(norms), rel=1e-3) if clip else min(norms) > .01


def test_mixup_mixes_pictures_and_losses(galaxies):
    "The loss of a batch is that of both galaxies of each mixture, by their shares"
    class Check(Callback):
        def after_loss(self):
            if not self.training: return
            loss, share, (other,), (own,) = GalaxyLoss(self.pred.shape[1], label_smoothing=.1, reduction='none'), self.learn.mix_up.lam.flatten(), self.learn.mix_up.yb1, self.yb
            by_hand = (share*loss(self.pred, own) + (1 - share)*loss(self.pred, other)).mean()
            shares.append(share)
            assert self.learn.loss.item() == pytest.approx(by_hand.item(), abs=1e-5)
    shares = []
    quietly(tiny(galaxies, mixup=.4, weight_power=0, cbs=Check()), lambda l: l.fit(2, 1e-3))
    assert len(shares) == 4 and all((s >= .5).all() and (s < 1).any() for s in shares)


def test_weights_of_classes_by_hand():
    "Nine galaxies and one: inverse to the square root of 9 and 1, that is 1/3 and 1, scaled so that ten galaxies weigh ten"
    assert class_weights([0]*9 + [1], 2, power=.5).tolist() == pytest.approx([10/12, 30/12])
    assert class_weights([0]*9 + [1], 2, power=1).tolist() == pytest.approx([5/9, 5])
    logits, y = torch.tensor([[2., 0], [0., 1]]), torch.tensor([0, 1])
    by_hand = (1*np.log1p(np.exp(-2)) + 3*np.log1p(np.exp(-1)))/4
    assert GalaxyLoss(2, [1., 3.])(logits, y).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize('power', [.5, 1.])
def test_galaxies_of_rare_classes_are_drawn_more_often(galaxies, power):
    kind = np.where(np.arange(200) % 10 == 0, 'rare', 'common')
    two = dataclasses.replace(galaxies, catalog=galaxies.catalog.assign(label=kind), classes=('common', 'rare'))
    seed_everything(0)
    dls = GalaxyDataLoaders.from_galaxies(two, bs=20, valid=range(50), device='cpu')
    learn = astroformer_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 2)), sample_power=power)
    drawn = np.concatenate([learn.dls.train.get_idxs() for _ in range(60)])
    rare = (kind[np.array(list(learn.dls.train_ds.items))[drawn]] == 'rare').mean()
    assert rare == pytest.approx({.5: 1/(1 + 9**.5), 1.: .5}[power], abs=.02)


def test_layers_are_let_go_one_by_one_at_rates_that_fall_towards_the_stem(path, tmp_path):
    dls = GalaxyDataLoaders.from_hdf5(path, size=32, progress=False, device='cpu')
    save_astroformer(astroformer_learner(dls, 'astroformer_nano'), tmp_path/'w')
    few = GalaxyDataLoaders.from_galaxies(dls.galaxies.take(range(40)), bs=32, valid=range(8), device='cpu')
    learn, seen = astroformer_learner(few, 'astroformer_nano', pretrained=tmp_path/'w', recipe='finetune', freeze_norms=True, unfreeze='one_by_one', freeze_epochs=1, freeze_steps=4, steps=2, lr_mult=32), []
    class Watch(Callback):
        def before_fit(self): seen.append([any(p.requires_grad for p in g) for g in self.learn.splitter(self.model)])
        def after_batch(self):
            if self.training: rates.append([h['lr'] for h in self.opt.hypers])
    rates, norms = [], {k: v.clone() for k, v in learn.model.state_dict().items() if 'running' in k}
    learn.add_cb(Watch())
    quietly(learn, lambda l: l.fit_recipe())
    assert [s.epochs for s in learn.recipe_stages()] == [4, 1, 1, 1, 1, 2]
    assert seen == [[k >= first for k in range(6)] for first in (5, 4, 3, 2, 1, 0)]
    assert np.diff(np.log2(rates[-1])) == pytest.approx([1]*5)                                  # 32 over five steps
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k, v in norms.items())


def test_forty_galaxies_get_as_many_steps_of_the_head_as_four_thousand():
    for batches in (1, 5, 62): assert training_stages(recipe('finetune'), 9, 6, batches)[0].epochs*batches >= recipes['finetune'].freeze_steps >= 100


def test_a_probe_changes_nothing_but_the_last_layer_and_gentle_steps_go_on_from_it(path, tmp_path):
    dls = GalaxyDataLoaders.from_hdf5(path, size=32, progress=False, device='cpu')
    save_astroformer(astroformer_learner(dls, 'astroformer_nano'), tmp_path/'w')
    def tuned(name, **kw): return astroformer_learner(dls, 'astroformer_nano', pretrained=tmp_path/'w', recipe=name, **kw)
    def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
    probe, fine = tuned('linear_probe'), tuned('finetune_few', lr=0., steps=1)
    before = weights(probe)
    for learn in probe, fine: quietly(learn, lambda l: l.fit_recipe())
    assert {k for k, v in weights(probe).items() if not torch.equal(v, before[k])} == {'head.fc.weight', 'head.fc.bias'}
    assert all(torch.allclose(v, weights(fine)[k]) for k, v in weights(probe).items())
    again = load_astroformer(save_astroformer(probe, tmp_path/'probe'))
    assert not again.cfg.hidden and torch.equal(again.head.fc.weight, probe.model.head.fc.weight)
    with pytest.raises(GalaxyDataError, match='no last layer that could be fitted alone'): astroformer_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))).fit_probe()


def test_a_probe_of_votes_of_a_network_of_timm_and_of_sampling(galaxies):
    votes = pd.DataFrame(np.random.default_rng(0).dirichlet([1, 1], len(galaxies)), columns=['smooth', 'disc'])
    polled = dataclasses.replace(galaxies, catalog=votes.assign(label=np.where(votes.smooth > .5, 'smooth', 'disc')), classes=('smooth', 'disc'))
    dls = GalaxyDataLoaders.from_galaxies(polled, y=['smooth', 'disc'], bs=32, device='cpu')
    for network in astroformer('astroformer_nano', img_size=32, classes=2), timm.create_model('resnet10t', num_classes=2):
        learn = astroformer_learner(dls, network, sample_power=0.).fit_probe()
        assert np.isfinite(evaluate(learn)['p']).all() and len(np.unique(evaluate(learn)['p'][:,0].round(6))) > 10
    few = GalaxyDataLoaders.from_galaxies(galaxies.take(range(60)), valid=range(10), augment=None, device='cpu')
    often, even = (astroformer_learner(few, astroformer('astroformer_nano', img_size=32, classes=len(few.vocab)), **how) for how in (dict(sample_power=1., weight_power=0.), dict(weight_power=1.)))
    even.model.load_state_dict(often.model.state_dict())
    for learn in often, even: learn.fit_probe()
    last = [l.model.get_classifier().weight for l in (often, even)]
    assert torch.allclose(*last, atol=1e-4) and torch.equal(often.model.stem.conv1.weight, even.model.stem.conv1.weight)
    with pytest.raises(GalaxyDataError, match='two classes or more, and there are 0'): load_astroformer_learner(save_astroformer(often, tempfile.mkdtemp() + '/w'), 'cpu').fit_probe()


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other allocators are left as they are')
def test_a_learner_keeps_the_memory_that_its_steps_need(path):
    "Pages that the system has to provide for three steps of a network with activations of 32 MiB, before there is a learner and after"
    code = f'''
import resource, torch
from torch import nn
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.learner import astroformer_learner
net, x = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1)), torch.randn(64, 8, 128, 128)
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3): net(x).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = [pages() for _ in range(2)]
astroformer_learner(GalaxyDataLoaders.from_hdf5('{path}', size=32, progress=False, device='cpu'), 'astroformer_nano')
print(usual[-1], min(pages() for _ in range(4)))'''
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    usual, kept = map(int, found.split('\n')[-2].split())
    assert usual > 100_000 and kept < usual/10


def test_a_network_of_timm_with_its_own_weights_is_fine_tuned(galaxies, tmp_path):
    theirs = timm.create_model('resnet10t', num_classes=7, in_chans=3)
    torch.save(theirs.state_dict(), tmp_path/'theirs.pth')
    dls = GalaxyDataLoaders.from_galaxies(galaxies.take(range(40)), bs=16, valid=range(8), device='cpu')
    learn = astroformer_learner(dls, 'resnet10t', pretrained=tmp_path/'theirs.pth', freeze_epochs=1, freeze_steps=0, freeze_norms=True)
    assert torch.equal(learn.model.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight) and learn.model.fc.out_features == len(dls.vocab)
    assert [s.what for s in learn.recipe_stages(1)] == ['the head alone', 'all layers'] and len(learn.splitter(learn.model)) == 6
    quietly(learn, lambda l: l.fit_recipe(1))
    assert not torch.equal(learn.model.layer3[0].conv1.weight, theirs.layer3[0].conv1.weight)
    with pytest.raises(Exception, match='made already'): astroformer_learner(dls, nn.Linear(2, 2), pretrained=tmp_path/'theirs.pth')
