"""Scores against scikit-learn and torchmetrics on anything Hypothesis thinks of, weighted and binned too; label errors against cleanlab."""
import numpy as np, pandas as pd, pytest, torch
from fastai.callback import progress # gives a Learner its no_bar
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from hypothesis import given, settings, strategies as st
from sklearn import metrics as sk

from astroformer_astro.core import GalaxyDataError
from astroformer_astro.metrics import (GalaxyMetric, balanced_accuracy, bin_column, binned_metrics, brier, class_table, classwise_ece, ece, galaxy_metrics, galaxy_scores,
                                       label_errors, macro_f1, nll, plot_binned, plot_confused, score_table, summary_metrics, top_k)

quick = settings(max_examples=40, deadline=None)


@st.composite
def answers(draw, most=60):
    "Classes, probabilities and weights: few or many galaxies, flat or peaked, classes that nobody is of or that nobody names"
    n, k, rng = draw(st.integers(1, most)), draw(st.integers(2, 6)), np.random.default_rng(draw(st.integers(0, 2**32)))
    p = rng.dirichlet(np.full(k, draw(st.sampled_from([.3, 1., 5.]))), n)
    return rng.integers(0, draw(st.integers(1, k)), n), p, rng.uniform(.1, 3, n)


def close(a, b): assert a == pytest.approx(b, abs=1e-9, nan_ok=True)


@quick
@given(answers())
def test_scores_equal_scikit_learn(case):
    y, p, w = case
    pred, labels = p.argmax(1), range(p.shape[1])
    for weights in (None, w):
        close(galaxy_scores['accuracy'](y, p, weights), sk.accuracy_score(y, pred, sample_weight=weights))
        close(galaxy_scores['balanced_accuracy'](y, p, weights), sk.recall_score(y, pred, labels=np.unique(y), average='macro', sample_weight=weights))
        close(balanced_accuracy(pred, y, weights), galaxy_scores['balanced_accuracy'](y, p, weights))
        close(macro_f1(y, p, weights), sk.f1_score(y, pred, average='macro', sample_weight=weights, zero_division=0))
        close(nll(y, p, weights), sk.log_loss(y, np.clip(p, 1e-12, 1), labels=labels, sample_weight=weights))
        for name, score in (('completeness', sk.recall_score), ('purity', sk.precision_score)):
            theirs = score(y, pred, labels=labels, average=None, sample_weight=weights, zero_division=np.nan)
            close(galaxy_scores[name](y, p, weights), theirs)
            close(class_table(y, p, labels, weights)[name].to_numpy(), theirs)
        if p.shape[1] > 2:
            close(brier(y, p, weights), np.average(((p - np.eye(p.shape[1])[y])**2).sum(1), weights=weights))
            close(top_k(y, p, weights, k=2), sk.top_k_accuracy_score(y, p, k=2, labels=labels, sample_weight=weights))


def test_brier_equals_scikit_learn():
    rng = np.random.default_rng(0)
    p, y, w = rng.dirichlet(np.ones(4), 200), rng.integers(0, 4, 200), rng.uniform(0, 1, 200)
    close(brier(y, p, w), sk.brier_score_loss(y, p, sample_weight=w, labels=range(4), scale_by_half=False))


@quick
@given(answers())
def test_scores_equal_torchmetrics(case):
    tm = pytest.importorskip('torchmetrics.functional.classification', reason='torchmetrics is not installed; it is an oracle only')
    y, p, _ = case
    q, t, k = torch.tensor(p), torch.tensor(y), p.shape[1]
    for bins in (1, 5, 15): assert ece(y, p, bins=bins) == pytest.approx(tm.multiclass_calibration_error(q, t, k, n_bins=bins).item(), abs=1e-6)
    per_class = [tm.binary_calibration_error(q[:, c], (t == c).long(), n_bins=15).item() for c in range(k)]
    assert classwise_ece(y, p) == pytest.approx(np.mean(per_class), abs=1e-6)
    assert galaxy_scores['accuracy'](y, p) == pytest.approx(tm.multiclass_accuracy(q, t, k, average='micro').item(), abs=1e-6)
    assert macro_f1(y, p) == pytest.approx(tm.multiclass_f1_score(q, t, k, average='macro').item(), abs=1e-6)
    if k > 2: assert top_k(y, p, k=2) == pytest.approx(tm.multiclass_accuracy(q, t, k, average='micro', top_k=2).item(), abs=1e-6)


@quick
@given(answers(), st.integers(0, 2**32))
def test_a_whole_weight_is_a_galaxy_given_so_often(case, seed):
    y, p, _ = case
    times = np.random.default_rng(seed).integers(1, 4, len(y))
    again = np.repeat(np.arange(len(y)), times)
    for score in galaxy_scores.values(): close(score(y, p, times), score(y[again], p[again]))


@quick
@given(answers())
def test_weights_may_be_stacked(case):
    y, p, w = case
    stack = np.stack([w, np.ones(len(y)), w**2])
    for score in galaxy_scores.values(): close(np.asarray(score(y, p, stack)), np.stack([score(y, p, row) for row in stack]))


@quick
@given(answers(), st.integers(1, 6), st.floats(0, .5))
def test_bins_hold_every_galaxy_once_and_score_it_alike(case, bins, gaps):
    y, p, w = case
    rng = np.random.default_rng(len(y))
    z = pd.Series(np.round(rng.exponential(.05, len(y)), 2), name='redshift').mask(rng.random(len(y)) < gaps)
    table, where = binned_metrics(y, p, z, bins, ['accuracy', 'macro_f1', 'ece', 'purity'], weights=w, n=3), bin_column(z, bins)
    assert table.n.sum() == len(y) and ('missing' in table.index) == bool(z.isna().any()) and table.index.name == 'redshift'
    for name, row in table.iterrows():
        i = np.flatnonzero(where == name)
        assert row.n == len(i)
        close(row.accuracy, sk.accuracy_score(y[i], p[i].argmax(1), sample_weight=w[i]))
        close(row.macro_f1, sk.f1_score(y[i], p[i].argmax(1), average='macro', sample_weight=w[i], zero_division=0))
        close(row.ece, ece(y[i], p[i], w[i]))
        if name != 'missing': assert z[i].notna().all()


@quick
@given(st.lists(st.floats(-90, 90) | st.just(float('nan')), min_size=1, max_size=50), st.integers(1, 8))
def test_bins_are_in_order(values, bins):
    where = bin_column(values, bins)
    known = [(c, np.asarray(values)[where == c]) for c in where.categories if c != 'missing']
    assert all(a.max() <= b.min() for (_, a), (_, b) in zip(known, known[1:])) and not where.isna().any() and len(known) <= bins


def test_quantile_bins_are_of_equal_counts():
    counts = pd.Series(bin_column(np.random.default_rng(0).normal(size=1000), 8)).value_counts()
    assert len(counts) == 8 and counts.max() - counts.min() <= 1


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for seed in range(200):
        y = np.repeat([0, 1], [60, 30])
        right = rng.random(90) < np.where(y == 0, .8, .6)
        t = score_table(y, np.eye(2)[np.where(right, y, 1 - y)], ['balanced_accuracy'], n=300, seed=seed)
        held += t.bootstrap_95_low.iloc[0] <= .7 <= t.bootstrap_95_high.iloc[0]
    assert 180 <= held <= 199


def test_bootstrap_is_stratified_and_seeded():
    y, p = np.array([0]*50 + [1]), np.random.default_rng(1).dirichlet([1, 1], 51)
    a, b, c = (score_table(y, p, ['balanced_accuracy', 'completeness'], n=100, seed=s) for s in (0, 0, 1))
    assert a.equals(b) and not a.equals(c) and a.notna().all(axis=None)
    assert a.loc['completeness_1', 'bootstrap_95_low'] == a.loc['completeness_1', 'value']       # the only one of its class is in every repetition


@pytest.mark.parametrize('break_it, said', [(lambda y, p: (y[:-1], p), 'do not go together'), (lambda y, p: (y, np.where(p > .9, np.nan, p)), 'no probabilities'),
                                            (lambda y, p: (y + 1, p), 'class numbers must be 0 to 2'), (lambda y, p: (y[:0], p[:0]), 'at least one galaxy')])
def test_what_cannot_be_scored_is_said(break_it, said):
    y, p = break_it(np.arange(30) % 3, np.random.default_rng(0).dirichlet([.3]*3, 30))
    for f in (ece, summary_metrics, score_table, label_errors, lambda y, p: class_table(y, p, range(3)), lambda y, p: binned_metrics(y, p, y)):
        with pytest.raises(GalaxyDataError, match=said): f(y, p)


def learner(metrics):
    torch.manual_seed(0)
    x, y = torch.randn(70, 4), torch.arange(70) % 3
    dl = lambda: DataLoader(list(zip(x, y)), bs=16)
    return Learner(DataLoaders(dl(), dl()), torch.nn.Linear(4, 3), CrossEntropyLossFlat(), metrics=metrics)


def test_metrics_of_a_learner_are_those_of_its_predictions():
    w = np.random.default_rng(0).uniform(size=70)
    names = 'accuracy', 'balanced_accuracy', 'macro_f1', 'nll', 'brier', 'ece', 'classwise_ece', 'top_2'
    learn = learner(galaxy_metrics(*names, 'completeness', 'purity', classes=['a', 'b', 'Round Smooth Galaxies']) + galaxy_metrics('nll', weights=w))
    with learn.no_bar(), learn.no_logging():
        values, (p, y) = learn.validate()[1:], learn.get_preds()
    y, p = y.numpy(), p.numpy()
    expected = score_table(y, p, [*names, 'completeness', 'purity'], n=0).value.tolist() + [nll(y, p, w)]
    assert list(values) == pytest.approx(expected, abs=1e-5, nan_ok=True)         # the purity of a class that nobody names
    assert [m.name for m in learn.metrics][8:11] == ['completeness_a', 'completeness_b', 'completeness_Round Smooth']
    with pytest.raises(GalaxyDataError, match="no score is called 'recall'"): galaxy_metrics('recall')


def test_metrics_go_through_the_loss():
    learn = learner([GalaxyMetric('nll')])
    learn.loss_func.activation = lambda x: torch.full_like(x, 1/3)
    with learn.no_bar(), learn.no_logging(): assert learn.validate()[1] == pytest.approx(np.log(3), abs=1e-6)


@quick
@given(answers(120))
def test_label_errors_equal_cleanlab(case):
    find = pytest.importorskip('cleanlab.filter', reason='cleanlab is not installed; it is an oracle only').find_label_issues
    y, p, _ = case
    if len(np.unique(y)) < 2: return
    y = np.unique(y, return_inverse=True)[1]            # cleanlab wants no gaps
    theirs = find(y, p, filter_by='confident_learning', return_indices_ranked_by='normalized_margin')
    ours = label_errors(y, p)
    assert set(ours.row) == set(theirs)
    assert ours.margin.is_monotonic_increasing and (ours.margin < 0).all()


@pytest.mark.parametrize('seed', range(5))
def test_planted_label_errors_are_found(seed):
    rng = np.random.default_rng(seed)
    truth = rng.choice(4, 1000, p=[.55, .2, .15, .1])
    p = np.stack([rng.dirichlet(.5 + 5*np.eye(4)[t]) for t in truth])
    y = np.where(rng.random(1000) < .05, (truth + rng.integers(1, 4, 1000)) % 4, truth)
    found = label_errors(y, p, pd.DataFrame(dict(name=np.arange(1000), row='kept out')), list('abcd'))
    wrong = np.flatnonzero(y != truth)
    assert np.isin(found.row[:25], wrong).mean() > .9 and np.isin(wrong, found.row).mean() > .5
    assert (found.name == found.row).all() and (found.suggested != found.labelled).all()
    assert (found.suggested.to_numpy() == np.array(list('abcd'))[truth[found.row]])[np.isin(found.row, wrong)].mean() > .9


def test_only_the_pictures_that_are_drawn_are_asked_for():
    asked = []
    class Pictures:
        def __getitem__(self, i): asked.append(i); return np.zeros((8, 8, 3))
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 3, 200), rng.dirichlet(np.ones(3), 200)
    fig = plot_confused(y, p, list('abc'), Pictures(), across=2)
    assert len(set(asked)) == len(asked) <= 9*4 and fig._repr_png_()
    best = max(np.flatnonzero((y == 0) & (p.argmax(1) == 1)), key=lambda i: p[i].max())
    assert best in asked
    assert plot_binned(binned_metrics(y, p, y, n=10))._repr_png_()
