"""Temperatures against netcal, conformal sets against mapie, coverage over many surveys, and what a calibrated learner keeps."""
import json, pickle, warnings

import numpy as np, pandas as pd, pytest, torch
from fastai.callback import progress # gives a Learner its no_bar
from fastai.callback import schedule # and its lr_find
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from hypothesis import given, settings, strategies as st
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from astroformer_astro.calibration import (ConformalSets, MCDropout, Opinions, Scaling, calibrate, calibration_test, coverage_range, coverage_table, cross_calibrate,
                                           current_scaling, ece_null, ensemble_predict, fit_conformal, fit_scaling, plot_reliability, reliability_table, use_scaling)
from astroformer_astro.core import GalaxyDataError
from astroformer_astro.metrics import classwise_ece, ece, nll
from astroformer_astro.recipe import GalaxyLoss

quick = settings(max_examples=15, deadline=None)


def survey(n, k=4, sharp=1.5, factor=2., seed=0):
    "Overconfident logits, true classes, and the probabilities that these were drawn from"
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, sharp, (n, k)) + np.linspace(0, 1, k)
    p = torch.tensor(honest).softmax(1).numpy()
    return factor*honest, (rng.random((n, 1)) > p.cumsum(1)).sum(1).clip(max=k - 1), p


def softmax(x): return torch.tensor(x).softmax(-1).numpy()


# temperature

@pytest.mark.parametrize('k, n, factor', [(3, 300, 2.), (4, 1000, 1.), (10, 2000, .5), (4, 150, 4.), (10, 500, 3.)])
def test_temperature_equals_netcal(k, n, factor):
    scaling = pytest.importorskip('netcal.scaling', reason='netcal is not installed; it is an oracle only')
    x, y, _ = survey(n, k, factor=factor, seed=k)
    theirs = scaling.TemperatureScaling()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs.fit(softmax(x), y)
    ours = fit_scaling(x, y)
    assert ours.temperature == pytest.approx(1/float(np.ravel(theirs.temperature)[0]), rel=1e-3)
    assert ours(torch.tensor(x)).numpy() == pytest.approx(theirs.transform(softmax(x)), abs=1e-3)


@quick
@given(st.integers(2, 8), st.sampled_from([.3, 1., 3., 10.]), st.integers(0, 10**6), st.sampled_from(['temperature', 'shift', 'vector']))
def test_no_step_away_is_likelier(k, factor, seed, kind):
    x, y, _ = survey(400, k, factor=factor, seed=seed)
    if len(np.unique(y)) < k: return
    s = fit_scaling(x, y, kind)
    best, rng = nll(y, s(torch.tensor(x)).numpy()), np.random.default_rng(seed)
    for _ in range(10):
        scale, shift = np.array(s.scale)*rng.normal(1, .02, len(s.scale)), np.array(s.shift) + rng.normal(0, .02, len(s.shift))*(kind != 'temperature')
        assert nll(y, Scaling(kind, tuple(scale), tuple(shift))(torch.tensor(x)).numpy()) >= best - 1e-9


def test_kinds_are_nested():
    x, y, _ = survey(500)
    scores = [nll(y, fit_scaling(x, y, kind)(torch.tensor(x)).numpy()) for kind in ('temperature', 'shift', 'vector')]
    assert scores == sorted(scores, reverse=True)


def test_shift_undoes_class_weights():
    x, y, p = survey(4000, factor=1.)
    tilted = x + np.log([5, 1, 1, .5])                  # what training with these weights would give
    assert calibration_test(y, fit_scaling(tilted, y)(torch.tensor(tilted)).numpy(), 200, score=classwise_ece)['distinguishable']
    mended = fit_scaling(tilted, y, 'shift')
    assert np.diff(mended.shift) == pytest.approx(-np.diff(np.log([5, 1, 1, .5])), abs=.25)
    assert not calibration_test(y, mended(torch.tensor(tilted)).numpy(), 200, score=classwise_ece)['distinguishable']


@pytest.mark.parametrize('seed', range(4))
def test_prior_undoes_known_class_weights_with_one_number(seed):
    w = np.array([5, 1, 1, .5])
    x, y, _ = survey(3000, factor=1., seed=seed)
    weighted = 2*x + np.log(w)                          # overconfident, and tilted by what the weighted loss asks for
    mended = fit_scaling(weighted, y, 'prior', class_weights=w)
    assert mended.temperature == pytest.approx(2, rel=.1) and np.diff(mended.shift) == pytest.approx(-np.diff(np.log(w))*mended.scale[0])
    assert calibration_test(y, mended(torch.tensor(weighted)).numpy(), 999)['p_value'] > .002       # one in twenty is below .05 by chance
    assert nll(y, mended(torch.tensor(weighted)).numpy()) < nll(y, fit_scaling(weighted, y)(torch.tensor(weighted)).numpy())


def test_without_weights_prior_is_temperature():
    x, y, _ = survey(500)
    assert fit_scaling(x, y, 'prior', class_weights=np.full(4, 3.)).temperature == pytest.approx(fit_scaling(x, y).temperature, rel=1e-6)


@pytest.mark.parametrize('weights', [None, [1, 2], [1, 2, 0, 1], [1, 2, np.nan, 1]])
def test_weights_that_cannot_be_undone_are_refused(weights):
    x, y, _ = survey(100)
    with pytest.raises(GalaxyDataError, match='takes 4 numbers above 0'): fit_scaling(x, y, 'prior', class_weights=weights)


@quick
@given(st.integers(2, 5), st.integers(0, 10**6))
def test_a_weighted_loss_is_least_at_weighted_probabilities(k, seed):
    "The fact that `prior` rests on: for known probabilities, the minimum of weighted cross-entropy is `w p`, made to sum to one"
    rng = np.random.default_rng(seed)
    p, w = rng.dirichlet(np.ones(k)), rng.uniform(.2, 5, k)
    loss = lambda q: -(p*w*np.log(q)).sum()
    best = p*w/(p*w).sum()
    assert all(loss(best) <= loss(rng.dirichlet(1 + 50*best)) + 1e-12 for _ in range(20))


# what is due to chance

def test_null_is_that_of_many_surveys():
    _, _, p = survey(300)
    rng = np.random.default_rng(5)
    drawn = [ece((rng.random((300, 1)) > p.cumsum(1)).sum(1).clip(max=3), p) for _ in range(1000)]
    assert np.quantile(ece_null(p, 1000), (.1, .5, .9)) == pytest.approx(np.quantile(drawn, (.1, .5, .9)), rel=.06)


def test_certain_probabilities_have_no_error_by_chance():
    assert ece_null(np.eye(3)[[0, 1, 2, 2]], 20).max() == 0


def test_cross_fitting_does_not_see_the_galaxies_it_calibrates():
    x, y, _ = survey(60)
    q, groups = cross_calibrate(x, y, groups=np.arange(60)//3), np.arange(60)//3
    wrong = y.copy(); wrong[:3] = (y[:3] + 1) % 4
    again = cross_calibrate(x, wrong, groups=groups, seed=0)
    mine = (q != again).any(1)
    assert mine.any()
    if np.array_equal(np.bincount(y), np.bincount(wrong)): assert not mine[:3].any()


def test_what_is_reported_is_not_the_homework():
    "With 4 classes, 8 numbers and 48 galaxies, a vector scaling looks better on its own galaxies than it is"
    gain = []
    for seed in range(8):
        x, y, _ = survey(60, factor=1., seed=seed)
        if np.bincount(y, minlength=4).min() < 6: continue
        gain.append(nll(y, cross_calibrate(x, y, 'vector', seed=seed)) - nll(y, fit_scaling(x, y, 'vector')(torch.tensor(x)).numpy()))
    assert len(gain) > 2 and np.mean(gain) > .02


# conformal sets

class Given:
    "A classifier whose input is its probabilities"
    def __init__(self, k): self.classes_, self.is_fitted = np.arange(k), True
    def __sklearn_is_fitted__(self): return True
    def fit(self, X, y): return self
    def predict_proba(self, X): return np.asarray(X)
    def predict(self, X): return np.asarray(X).argmax(1)


def mapie_sets(method, p, y, new, coverage, **kwargs):
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin
    model = type('Given', (Given, ClassifierMixin, BaseEstimator), {})(p.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = SplitConformalClassifier(model, confidence_level=coverage, conformity_score=method, prefit=True, random_state=7).conformalize(p, y)
        return theirs.predict_set(new, conformity_score_params=kwargs)[1][:, :, 0]


@pytest.mark.parametrize('coverage', [.8, .9, .95])
@pytest.mark.parametrize('k, n', [(3, 200), (10, 500), (4, 61)])
def test_aps_and_lac_equal_mapie(k, n, coverage):
    pytest.importorskip('mapie', reason='mapie is not installed; it is an oracle only')
    x, y, _ = survey(n + 300, k, sharp=1., seed=n)
    p = softmax(x)
    old, new, labels = p[:n], p[n:], y[:n]
    aps = fit_conformal(old, labels, coverage, 'aps', randomised=True, seed=7)
    assert np.array_equal(aps(new), mapie_sets('aps', old, labels, new, coverage, include_last_label=True))
    assert np.array_equal(aps(new, randomised=True, seed=7), mapie_sets('aps', old, labels, new, coverage, include_last_label='randomized'))
    assert np.array_equal(fit_conformal(old, labels, coverage, 'lac')(new), mapie_sets('lac', old, labels, new, coverage))


@pytest.mark.parametrize('method', ['lac', 'aps', 'raps'])
@pytest.mark.parametrize('by_class', [False, True])
@pytest.mark.parametrize('randomised', [False, True])
def test_sets_cover_as_often_as_they_promise(method, by_class, randomised):
    "200 surveys of exchangeable galaxies, the probabilities overconfident: coverage in the mean, and each count within its interval about 95 times of 100"
    n_fit, n, held, inside = 300, 500, np.zeros((200, 4)), 0
    low, high = coverage_range(.9, n_fit, n)
    total = np.zeros((200, 4))
    for seed in range(200):
        x, y, _ = survey(n_fit + n, seed=seed)
        p = softmax(x)
        sets = fit_conformal(p[:n_fit], y[:n_fit], .9, method, by_class, seed, randomised)(p[n_fit:], randomised, 1000 + seed)
        right, new = sets[np.arange(n), y[n_fit:]], y[n_fit:]
        held[seed], total[seed] = np.bincount(new, right, 4), np.bincount(new, minlength=4)
        inside += low <= right.mean() <= high
    share = held.sum()/total.sum()
    if by_class: assert ((held.sum(0)/total.sum(0)) > .895).all() and share < .93          # a little above: a rank is a whole number
    else: assert share == pytest.approx(.9, abs=.006) and 180 <= inside <= 199


def test_sets_without_random_points_cover_at_least_that_and_are_never_empty():
    for seed in range(20):
        x, y, _ = survey(900, seed=seed)
        p = softmax(x)
        for method in ('aps', 'raps'):
            fitted = fit_conformal(p[:400], y[:400], .9, method, randomised=True)
            sets = fitted(p[400:])
            assert sets.any(1).all() and fit_conformal(p[:400], y[:400], .9, method)(p[400:]).any(1).all() and sets[np.arange(500), p[400:].argmax(1)].all() and (sets >= fitted(p[400:], randomised=True)).all()
            assert np.array_equal(sets, fitted(p[400:]))


@quick
@given(st.integers(2, 6), st.integers(5, 60), st.integers(0, 10**6), st.sampled_from(['lac', 'aps', 'raps']))
def test_more_coverage_never_shrinks_a_set(k, n, seed, method):
    x, y, _ = survey(n, k, seed=seed)
    p = softmax(x)
    sets = [fit_conformal(p, y, c, method)(p) for c in (.5, .8, .9, .99)]
    assert all((a <= b).all() for a, b in zip(sets, sets[1:]))
    if n < 99: assert sets[-1].all()                     # too few to promise 99 %


def test_coverage_table_counts():
    rng = np.random.default_rng(0)
    y, sets, z = rng.integers(0, 3, 300), rng.random((300, 3)) < .7, pd.Series(rng.random(300), name='z').mask(rng.random(300) < .1)
    t = coverage_table(y, sets, z, 3)
    assert t.n.iloc[0] == 300 == t.n.iloc[1:].sum() and t.index[-1] == 'missing' and t.index.name == 'z'
    i = z.isna().to_numpy()
    assert t.coverage['missing'] == sets[i, y[i]].mean() and t.mean_size['missing'] == sets[i].sum(1).mean() and t.empty_sets['all'] == (sets.sum(1) == 0).sum()


# a learner

class Net(nn.Sequential):
    def __init__(self, drop=.5, path=0.): super().__init__(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(drop), DropPath(path), nn.Linear(16, 3))


class Vocab(DataLoaders): vocab = ['a', 'b', 'c']


def learner(loss=None, n=200, seed=0, **kwargs):
    torch.manual_seed(seed)
    x = torch.randn(n, 4)
    y = (x[:, :3]*3 + 3*torch.randn(n, 3)).argmax(1)
    dl = lambda: DataLoader(list(zip(x, y)), bs=32)
    learn = Learner(Vocab(dl(), dl()), Net(**kwargs), loss or CrossEntropyLossFlat())
    learn.create_opt()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, .05)
    return learn


def preds(learn, **kwargs):
    with learn.no_bar(), learn.no_logging(): return learn.get_preds(**kwargs)


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat, nn.CrossEntropyLoss, lambda: F.cross_entropy, lambda: CrossEntropyLossFlat(weight=torch.tensor([1., 2, 3]), label_smoothing=.1)])
@pytest.mark.parametrize('kind', ['temperature', 'shift', 'vector'])
def test_any_loss_can_be_calibrated_and_still_trains_the_same(loss, kind):
    learn = learner(loss())
    x, y = preds(learn, act=lambda x: x)
    before = learn.loss_func(x, y)
    s = calibrate(learn, kind)
    assert torch.allclose(preds(learn)[0], (x*torch.tensor(s.scale) + torch.tensor(s.shift)).softmax(1), atol=1e-5)
    assert learn.loss_func(x, y) == before and current_scaling(learn) is s
    assert set(s.record) == {'n', 'folds', 'orientations', 'ece_expected_95', 'p_value'} | {f'{k}_{when}' for k in ('ece', 'nll', 'accuracy', 'balanced_accuracy') for when in ('before', 'after')}
    use_scaling(learn, None)
    assert current_scaling(learn) is None


def test_sets_by_class_are_kept():
    learn = learner()
    s = calibrate(learn, coverage=.8, by_class=True)
    assert len(s.sets['thresholds']) == 3 and len(calibrate(learn, coverage=.8).sets['thresholds']) == 1


@pytest.mark.parametrize('loss', [lambda w: nn.CrossEntropyLoss(weight=w), lambda w: CrossEntropyLossFlat(weight=w), lambda w: GalaxyLoss(3, w)])
def test_a_loss_that_leans_is_undone_by_default(loss):
    learn = learner(loss(torch.tensor([4., 1, 1])))
    s = calibrate(learn)
    assert s.kind == 'prior' and np.diff(s.shift) == pytest.approx([np.log(4)*s.scale[0], 0], abs=1e-6)
    assert calibrate(learn, 'temperature').kind == 'temperature' and calibrate(learner(loss(torch.ones(3)))).kind == 'temperature'


def test_a_loss_that_is_shared_is_left_alone():
    loss = CrossEntropyLossFlat()
    one, other = learner(loss), learner(loss)
    calibrate(one)
    assert current_scaling(other) is None and current_scaling(one) is not None


def test_training_drops_the_calibration_but_looking_for_a_rate_does_not():
    learn = learner()
    calibrate(learn)
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.lr_find(num_it=5, show_plot=False)
        assert current_scaling(learn) is not None
        with pytest.warns(UserWarning, match='calibrate again'): learn.fit(1)
    assert current_scaling(learn) is None


def test_a_pickled_loss_stays_calibrated():
    learn = learner()
    s = calibrate(learn, coverage=.9)
    learn.loss_func = pickle.loads(pickle.dumps(learn.loss_func))
    found = current_scaling(learn)
    assert found == s and ConformalSets.from_dict(found.sets).coverage == .9


def test_scaling_survives_json():
    learn = learner()
    for kind in ('temperature', 'shift', 'vector'):
        s = calibrate(learn, kind, coverage=.8, method='raps')
        again = Scaling.from_dict(json.loads(json.dumps(s.to_dict())))
        x, _ = preds(learn, act=lambda x: x)
        assert torch.equal(again(x), s(x)) and again.kind == kind and again.record['n'] == 200


def test_half_precision_and_other_devices_are_kept():
    x = torch.randn(5, 3).half()
    assert Scaling(scale=(.5,))(x).dtype == torch.float16 and Scaling(scale=(.5,))(x).shape == (5, 3)


# several opinions

def test_dropout_is_on_only_while_it_is_asked_for():
    learn = learner(path=.3)
    stats = learn.model[1].running_mean.clone()
    state = torch.get_rng_state()
    a, b = ensemble_predict(MCDropout(learn, 5, seed=1)), ensemble_predict(MCDropout(learn, 5, seed=1))
    assert np.array_equal(a.members, b.members) and (a.members[0] != a.members[1]).any() and a.mutual_information.mean() > 0
    assert not np.array_equal(a.members, ensemble_predict(MCDropout(learn, 5, seed=2)).members)
    assert torch.equal(learn.model[1].running_mean, stats) and torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in learn.model.modules())
    assert np.array_equal(ensemble_predict(learn).members[0], preds(learn)[0].numpy())


def test_the_mean_of_many_masks_is_near_the_network():
    learn = learner(drop=.1)
    assert ensemble_predict(MCDropout(learn, 40)).p == pytest.approx(preds(learn)[0].numpy(), abs=.1)


def test_members_speak_through_their_own_calibration():
    one, other = learner(seed=0), learner(seed=0)
    use_scaling(other, Scaling(scale=(0.,)))
    both = ensemble_predict([one, other])
    assert both.members[1] == pytest.approx(1/3) and both.p == pytest.approx((preds(one)[0].numpy() + 1/3)/2, abs=1e-6)


def test_networks_that_do_not_go_together_are_refused():
    one, other = learner(), learner()
    class Others(Vocab): vocab = ['a', 'b', 'd']
    other.dls.__class__ = Others
    with pytest.raises(GalaxyDataError, match='different classes'): ensemble_predict([one, other])
    with pytest.raises(GalaxyDataError, match='different galaxies'): ensemble_predict([one, learner(seed=3)])


@quick
@given(st.integers(1, 5), st.integers(1, 20), st.integers(2, 5), st.integers(0, 10**6))
def test_uncertainty_adds_up(s, n, k, seed):
    m = np.random.default_rng(seed).dirichlet(np.full(k, .5), (s, n))
    o = Opinions(m)
    own = -(m*np.log(np.maximum(m, 1e-300))).sum(-1).mean(0)
    assert o.entropy == pytest.approx(own + o.mutual_information, abs=1e-9)
    assert (o.mutual_information >= 0).all() and (o.entropy <= np.log(k) + 1e-9).all() and ((o.agreement >= 0) & (o.agreement <= 1)).all()


def test_reliability_diagram_counts_all_galaxies():
    x, y, p = survey(500)
    t = reliability_table(y, softmax(x))
    assert t.n.sum() == 500 and (t.accuracy_95_low.dropna() <= t.accuracy.dropna()).all()
    gap = (t.n/500*(t.accuracy - t.confidence).abs()).sum()
    assert gap == pytest.approx(ece(y, softmax(x), bins=10))
    fig = plot_reliability(y, {'before': softmax(x), 'after': p})
    assert len(fig.axes) == 4 and fig._repr_png_().startswith(b'\x89PNG')
