"The widgets: their states without a widget, the views tied to them, and what is left where neither a kernel nor ipywidgets is"
import base64, os, signal, subprocess, sys, threading, time
from types import SimpleNamespace

import numpy as np, pandas as pd, psutil, pytest, timm, torch
from astropy.io import fits
from matplotlib import pyplot as plt
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from astroformer_astro.calibration import calibrate, use_scaling
from astroformer_astro.core import GalaxyDataError, seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.images import GalaxySet
from astroformer_astro.interpret.attention import AttentionMaps
from astroformer_astro.interpret.attribution import Attribution, Explainer, Prediction
from astroformer_astro.learner import astroformer_learner
from astroformer_astro.synth import synth_arrays, synth_fits
from astroformer_astro.widgets.augment import AugmentPreview
from astroformer_astro.widgets.explorer import GalaxyExplorer, comparison_figure, explorer_view
from astroformer_astro.widgets.relabel import Journal, Relabel
from astroformer_astro.widgets.state import ExplorerState, InThread, Newest, at_once

torch.set_num_threads(1)
PNG = b'\x89PNG'
classes = 'round', 'spiral', 'other'


def galaxies(n=30, size=32):
    "With positions, a scale, redshifts of which one is missing, and a size"
    found, i = synth_arrays(n, size, balance='uniform'), np.arange(n)
    table = dict(label=[classes[k % 3] for k in i], ra=i*1., dec=0., pxscale=.5, redshift=np.where(i == 3, np.nan, i/100), MajAx=i/10, name=[f'G{k}' for k in i])
    return GalaxySet(found['images'], pd.DataFrame(table), classes)


def loaders(**kwargs): return GalaxyDataLoaders.from_galaxies(galaxies(), bs=8, augment=None, separation=1., **dict(valid_pct=.4) | kwargs)


@pytest.fixture(scope='module')
def learn():
    seed_everything(0)
    return astroformer_learner(loaders(), 'astroformer_nano')


@pytest.fixture
def state(learn):
    "Saliency, which takes one step, keeps these tests quick"
    s = ExplorerState(learn, [0, 1, 2, 3, 4])
    s.method = 'saliency'
    return s


class Told:
    "An explainer whose answers are known and counted"
    def __init__(self): self.asked = []
    def predict(self, item): self.asked.append(('predict', item)); return Prediction(np.zeros((4, 4, 3)), dict(a=.6, b=.4), 'a')
    def attribute(self, item, progress=None, **how):
        self.asked.append(('attribute', item, how))
        if item == 1: raise ZeroDivisionError('a fault of ours')
        return Attribution(np.zeros((4, 4, 3)), dict(a=.6, b=.4), 'a', values=np.full((3, 4, 4), float(item)), target='a', method='saliency')
    def attention(self, item): self.asked.append(('attention', item)); return AttentionMaps([np.full((2, 4, 4), .25)], [(2, 2)], (4, 4))


class Deaf:
    "A learner that an explainer need not ask"
    def __init__(self): self.model, self.dls = torch.nn.Linear(1, 1), SimpleNamespace(vocab=('a', 'b'), loaders=[1, 2], catalog=pd.DataFrame(dict(label=['a', 'b', 'b'])))


def told_state(items, **kwargs):
    told = Told()
    return ExplorerState(Deaf(), items, explain=lambda learn: told, **kwargs), told


# --- the state

def test_answers_follow_choices():
    s, told = told_state([0, 2])
    assert s.attribution.values.max() == 0
    s.next()
    assert s.attribution.values.max() == 2 and s.index == 1
    s.next()
    assert s.index == 1, 'the last one stays'
    s.target, s.baseline = 'b', 'black'
    assert [a for a in told.asked if a[0] == 'attribute'][-1][2].items() >= dict(target='b', baseline='black').items()


def test_answers_are_kept_until_the_network_changes(learn):
    s, told = told_state([0])
    n = len(told.asked)
    s.update()
    assert len(told.asked) == n
    with torch.no_grad(): s.learn.model.weight += 1
    s.update()
    assert len(told.asked) == 2*n
    s.learn.model.load_state_dict(torch.nn.Linear(1, 1).state_dict())
    s.update()
    assert len(told.asked) == 3*n


def test_a_calibration_is_noticed(state, learn):
    before = state.prediction.probabilities
    calibrate(learn, coverage=.8)
    try:
        state.update()
        assert state.prediction.probabilities != before and state.prediction.predicted in state.answer.members
        v = parts(explorer_view(state))
        assert '(calibrated)' in v.said.value and '80% set' in v.said.value
    finally: use_scaling(learn, None)


def test_a_failure_takes_away_only_its_own_answer():
    s, _ = told_state([0, 1])
    s.next()
    assert s.attribution is None and s.prediction is not None and s.attention is not None
    assert s.error == 'ZeroDivisionError: a fault of ours' and not s.busy
    s.previous()
    assert s.attribution is not None and s.error == ''


def test_one_drawing_a_change_and_never_of_a_mixture():
    s, _ = told_state([0, 2])
    seen = []
    s.observe(lambda c: seen.append((c['new'].place, c['new'].attribution.values.max())), 'answer')
    s.next()
    assert seen == [(1, 2)]


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_stale_answers_never_overwrite_newer_ones(order):
    "Three choices are made before any is answered; the answers come in every order, each with its steps among the others'"
    waiting = []
    s, _ = told_state([0, 2, 4], run=waiting.append)
    at_once(waiting.pop())
    seen = []
    s.observe(lambda c: seen.append(c['new'].place), 'answer')
    for index in (1, 2, 0): s.index = index
    assert s.busy and len(waiting) == 3
    for steps in waiting: next(steps, None)                     # all have begun
    for k in order: at_once(waiting[k])
    assert seen == [0] and s.answer.place == 0 and not s.busy


def test_an_answer_on_its_way_is_dropped_even_if_it_does_not_look_round():
    "The work of the older question is all done; it is delivered after the newer one"
    found, steps = [], []
    newest = Newest(steps.append)
    def work(name):
        def computed(check):
            yield
            return name
        return computed
    newest.ask(work('old'), found.append, found.append)
    next(steps[0])
    newest.ask(work('new'), found.append, found.append)
    at_once(steps[1]); at_once(steps[0])
    assert found == ['new']


def test_work_in_a_thread_is_stopped_by_the_next_choice():
    "The first galaxy takes for ever, unless its progress is told that nobody waits"
    begun, released = threading.Event(), []
    class Slow(Told):
        def attribute(self, item, progress=None, **how):
            while item == 0 and not released:
                begun.set(); progress(1, 10); time.sleep(.005)
            return super().attribute(item, **how)
    slow = Slow()
    s = ExplorerState(Deaf(), [0, 2], run=InThread(), explain=lambda learn: slow)
    assert begun.wait(10) and s.busy
    s.index = 1
    s.wait()
    assert s.answer.place == 1 and s.error == '' and ('attribute', 0) not in [a[:2] for a in slow.asked]
    begun.clear(); s.index = 0
    assert begun.wait(10)
    s.stop(); s.wait()
    assert 'stopped before it was done' in s.error and not s.busy and s.attribution is None
    released.append(True); s.update(); s.wait()
    assert s.answer.place == 0 and s.error == ''


def test_a_training_meanwhile_is_not_disturbed(learn):
    "Looking needs evaluation mode and no gradients; the network that is trained has both as before at every moment"
    s = ExplorerState(learn, [0, 1, 2], run=InThread())
    learn.model.train()
    try:
        s.method = 'occlusion'
        while s.busy: assert all(p.requires_grad for p in learn.model.parameters()) and all(m.training for m in learn.model.modules())
        s.wait()
        assert s.attribution.method == 'occlusion'
    finally: learn.model.eval()


def test_weights_made_under_inference_mode_are_copied_and_explained():
    "They give no gradients themselves"
    dls = loaders()
    with torch.inference_mode(): made = astroformer_learner(dls, 'astroformer_nano')
    s = ExplorerState(made, [0])
    assert s.error == '' and s.attribution.values.any()


# --- filters

def test_filters(state, learn):
    labels = learn.dls.catalog.label
    for name in classes:
        state.label = name
        assert [labels[state.items[i]] for i in state.shown] == [name]*len(state.shown)
        assert state.prediction.truth == name and state.index == 0
    state.label = None
    state.wrong = True
    right = [i for i in range(5) if i not in state.shown]
    state.wrong = False
    for i in range(5):
        state.index = i
        assert (state.prediction.predicted == state.prediction.truth) == (i in right)
    called = state.prediction.predicted
    state.called = called
    assert [i for i in range(5) if state.table.predicted[i] == called] == list(state.shown)
    state.called = None
    middle = float(state.table.confidence.median())
    state.confidence = (middle, 1.)
    assert len(state.shown) == 3
    state.confidence, state.ranges = (0., 1.), dict(redshift=(.01, .04))
    assert state.shown == (1, 2, 4), 'one without redshift does not pass'
    state.ranges = dict(MajAx=(.2, .3))
    assert state.shown == (2, 3)


def test_a_filter_waits_for_the_network_and_then_is_applied(learn):
    s = ExplorerState(learn, run=InThread())
    s.wrong = True
    assert s.busy
    s.wait()
    assert s.surveyed and not s.busy and len(s.shown) == (s.table.label != s.table.predicted).sum()


def test_what_a_filter_excludes_is_not_shown_after_a_survey_was_stopped(learn):
    "The next choice asks again, and whoever waits for it sees only what passes"
    begun, released = threading.Event(), threading.Event()
    s = ExplorerState(learn, [0, 1, 2, 3, 4], run=InThread())
    s.method = 'saliency'
    s.wait()
    before, s._advance = s._advance, lambda share: (begun.set(), released.wait(10))
    s.wrong = True
    assert begun.wait(10)
    s.stop(); released.set(); s.wait()
    assert 'choose anything to go on' in s.error and not (s.surveyed or s.surveying or s.busy)
    s._advance = before
    s.index = 1
    s.wait()
    assert s.surveyed and not s.busy and s.shown == tuple(np.flatnonzero(s.table.label != s.table.predicted)) != (0, 1, 2, 3, 4)


def test_a_survey_that_fails_can_be_had_again(state):
    def fail(change): raise ZeroDivisionError('a fault of ours')
    state.observe(fail, 'table')
    state.wrong = True
    assert state.error == 'ZeroDivisionError: a fault of ours' and not (state.busy or state.surveying or state.surveyed)
    state.unobserve(fail, 'table')
    state.index = 1
    assert state.error == '' and state.surveyed and len(state.shown) < 5


def test_another_network_goes_through_all_galaxies_where_the_one_before_did():
    s, _ = told_state([0, 1])
    s.survey()
    assert s.table.predicted.tolist() == ['a', 'a']
    with torch.no_grad(): s.learn.model.weight += 1
    s.update()
    assert s.surveyed and s.table.predicted.tolist() == ['a', 'a']
    fresh, _ = told_state([0, 1])
    with torch.no_grad(): fresh.learn.model.weight += 1
    fresh.update()
    assert not fresh.surveyed and fresh.table.predicted.isna().all()


@pytest.mark.parametrize('choice, found', [(dict(label='odd'), "no class 'odd'"), (dict(ranges=dict(odd=(0, 1))), "no column 'odd'"), (dict(index=99), 'no galaxy 99'), (dict(method='x'), "no method 'x'"),
                                           (dict(baseline='x'), "no baseline 'x'"), (dict(target='x'), "no class 'x'"), (dict(against='x'), "no class 'x'"), (dict(stretch='x'), "no stretch 'x'"),
                                           (dict(beside='x'), "no method 'x'"), (dict(beside='pinned', pinned=999), 'no galaxy 999'), (dict(beside='pinned', pinned=-1), 'no galaxy -1'), (dict(beside='pinned'), 'no galaxy is pinned'), (dict(confidence=(0., .01)), 'no galaxy of 5 passes'),
                                           (dict(block=7), 'no block 7'), (dict(head=7), 'no head 7'), (dict(query=(99, 0)), 'outside the image')])
def test_every_wrong_choice_is_said_and_mended(state, choice, found):
    before = {name: getattr(state, name) for name in choice}
    for name, value in choice.items(): setattr(state, name, value)
    assert found in state.error and 'Error' not in state.error
    for name, value in before.items(): setattr(state, name, value)
    assert state.error == '' and None not in (state.prediction, state.attribution, state.attention)


def test_what_both_pictures_lack_is_said_once(state):
    state.beside, state.target = 'occlusion', 'x'
    assert state.error.count("no class 'x'") == 1
    state.head = 7
    assert state.error.count("no class 'x'") == 1 and 'no head 7' in state.error


def test_grad_cam_of_a_stage_that_does_not_exist(state):
    state.method, state.stage = 'grad_cam', 'stage9'
    assert "no stage 'stage9'" in state.error
    state.stage = 'stage2'
    assert state.error == '' and state.attribution.stage == 'stage2'


@pytest.mark.parametrize('item, found', [('missing.png', 'missing.png does not exist'), (torch.zeros(3, 16, 16), 'expected 3 x 32 x 32'), (torch.zeros(5, 32, 32), 'expected 3 x 32 x 32'),
                                         (np.zeros((32, 32, 5), np.uint8), 'expected'), (torch.full((3, 32, 32), np.nan), 'are no numbers'), (99, 'cannot be read')])
def test_galaxies_that_cannot_be_looked_at_say_so_in_the_widget(learn, item, found):
    s = ExplorerState(learn, [item, 0])
    v = parts(explorer_view(s))
    assert found in v.line.value and v.upper.value == b'' and len(v.thumbnails[0].value)
    s.survey()
    assert found in s.table.problem[0] and s.table.predicted[1] in classes
    s.next()
    assert s.error == '' and drawn(v.upper)


def test_no_galaxies(learn):
    view = explorer_view(ExplorerState(learn, []))
    assert 'validation set is empty' in parts(view).line.value
    explorer = GalaxyExplorer(learn, items=[])
    view = explorer.view()
    explorer.state.wait()
    assert 'validation set is empty' in parts(view).line.value and not explorer.state.surveying


def test_a_network_without_attention_is_explained_all_the_same():
    seed_everything(0)
    plain = astroformer_learner(loaders(), timm.create_model('resnet10t', num_classes=3))
    s = ExplorerState(plain, [0])
    s.method = 'saliency'
    v = parts(explorer_view(s))
    assert drawn(v.upper) and v.lower.value == b'' and s.error == '' and 'no attention to look at' in v.problem.value
    assert v.attention.children == ()


def test_a_network_that_gives_no_gradients_says_so():
    class NoGrad(torch.nn.Module):
        def __init__(self): super().__init__(); self.last = torch.nn.Linear(12, 3)
        @torch.no_grad()
        def forward(self, x): return self.last(torch.nn.functional.avg_pool2d(x, 16).flatten(1))
    s = ExplorerState(SimpleNamespace(model=NoGrad(), dls=loaders(), loss_func=None), [0])
    v = parts(explorer_view(s))
    assert 'gives no gradients' in v.line.value and 'use occlusion' in v.line.value
    s.method = 'occlusion'
    assert v.line.value == '' and drawn(v.upper)


def test_explaining_under_no_grad(learn):
    with torch.no_grad(): s = ExplorerState(learn, [0])
    assert s.error == ''


# --- the view

def parts(view):
    filters, shelf, controls, work, said, pictures, attention, problem = view.children
    return SimpleNamespace(filters=filters.children, thumbnails=[b.children[0] for b in shelf.children[0].children], names=[b.children[1] for b in shelf.children[0].children], steps=shelf.children[1].children,
                           controls=controls.children, bar=work.children[1], cancel=work.children[0], line=work.children[2], said=said.children[0], export=said.children[1].children,
                           upper=pictures.children[0], pair=pictures.children[1], lower=pictures.children[2], attention=attention, problem=problem)


def drawn(image): return bytes(image.value).startswith(PNG)


def test_widgets_are_tied_to_the_state(state):
    v = parts(explorer_view(state))
    first = v.upper.value, v.lower.value
    assert drawn(v.upper) and drawn(v.lower) and v.pair.value == b''
    v.names[2].click()
    assert state.index == 2 and v.upper.value != first[0] and v.lower.value != first[1]
    v.steps[1].click(); v.steps[1].click()
    assert state.index == 0 and (v.upper.value, v.lower.value) == first
    v.attention.children[2].value = 0
    assert state.query[0] == 0 and v.upper.value == first[0] and v.lower.value != first[1]
    v.controls[2].value = 'other'
    assert state.target == 'other' and v.upper.value != first[0]
    state.target = None
    assert v.controls[2].label == 'as predicted'
    v.controls[7].click()
    state.next()
    assert drawn(v.pair) and v.controls[6].label == 'pinned galaxy'


def test_a_method_beside_itself_is_drawn_twice(state):
    state.beside = 'saliency'
    titles = [ax.get_title().split('\n')[0] for ax in comparison_figure(state.answer).axes]
    assert {'saliency', 'again: saliency'} <= set(titles)


def test_a_calibration_of_eight_orientations_is_told(state, learn):
    try:
        for orientations in (True, False):
            calibrate(learn, coverage=.8, orientations=orientations)
            state.update()
            assert ('holds for one only roughly' in parts(explorer_view(state)).said.value) == orientations
    finally: use_scaling(learn, None)


def test_errors_are_on_the_screen_and_nothing_stale_is(state, monkeypatch):
    v = parts(explorer_view(state))
    state.index = 99
    assert 'there is no galaxy 99' in v.line.value and (v.upper.value, v.lower.value, v.upper.layout.display) == (b'', b'', 'none')
    state.index = 0
    monkeypatch.setattr('astroformer_astro.widgets.explorer.plot_explanation', lambda *a, **k: 1/0)
    v.steps[2].click()
    assert 'ZeroDivisionError' in v.line.value and v.upper.value == b'' and drawn(v.lower)


def test_export_and_its_errors_are_said(learn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explorer = GalaxyExplorer(learn, [0, 'missing.png'], run=at_once)
    explorer.state.method = 'saliency'
    v = parts(explorer.widget)
    for v.export[1].value in ('png', 'npz', 'fits'): v.export[0].click()
    v.export[0].click()                                     # what is there already is not written over
    with fits.open(next(tmp_path.glob('*.fits'))) as hdus:
        assert hdus[0].header['OBJECT'] == 'G0' and 'BAND1' not in hdus[0].header, 'of a picture the bands are not known'
        assert hdus[0].header['WEIGHTS'] == f'{explorer.state.mark[2]:08x}' and hdus[0].header['CRVAL1'] == 0
    name = f"galaxy_0_saliency_for_{explorer.state.attribution.target.replace(' ', '-')}"
    assert {p.name for p in tmp_path.iterdir()} == {f'{name}.{e}' for e in ('fits', 'npz', 'png')} | {f'{name}_2.fits'} and str(tmp_path) in v.line.value
    explorer.state.next()
    v.export[0].click()
    assert 'no attribution to write' in v.line.value and 'missing.png does not exist' in v.line.value
    with pytest.raises(GalaxyDataError, match='cannot be written'): explorer.save('/proc/no/now.png')
    with pytest.raises(GalaxyDataError, match="ends in '.jpg'"): explorer.export('a.jpg')


def test_static_picture(learn, tmp_path):
    explorer = GalaxyExplorer(learn, [0, 1])
    bundle = explorer._repr_mimebundle_()
    assert base64.b64decode(bundle['image/png']).startswith(PNG) and 'application/vnd.jupyter.widget-view+json' in bundle
    assert explorer.show().axes, 'the figure, outside a notebook'
    explorer.save(tmp_path/'now.png')
    assert (tmp_path/'now.png').read_bytes().startswith(PNG)
    explorer.state.index = 99
    assert 'no galaxy 99' in explorer.figure().texts[0].get_text() and explorer.png().startswith(PNG)


def test_exported_to_html_the_picture_stands_in_for_the_widgets(learn):
    "There is no kernel, and the notebook keeps no state of widgets"
    output = new_output('execute_result', GalaxyExplorer(learn, [0])._repr_mimebundle_())
    page, _ = HTMLExporter().from_notebook_node(new_notebook(cells=[new_code_cell('GalaxyExplorer(learn)', outputs=[output])]))
    assert 'data:image/png;base64,' in page and 'widget-view+json' not in page


def test_without_anywidget_pictures_are_plain_and_buttons_do_the_same(state, monkeypatch):
    import ipywidgets
    monkeypatch.setitem(sys.modules, 'anywidget', None)
    from astroformer_astro.widgets.parts import _sensor
    _sensor.cache_clear()
    try: v = parts(explorer_view(state))
    finally: _sensor.cache_clear()
    assert type(v.upper) is ipywidgets.Image and type(v.thumbnails[0]) is ipywidgets.Image
    v.names[3].click(); v.attention.children[3].value = 0
    assert state.index == 3 and state.query == (16, 0)


@pytest.mark.parametrize('module', ['state', 'parts', 'explorer', 'augment', 'relabel'])
def test_import_needs_neither_ipywidgets_nor_captum(module):
    code = f'''
import sys
for name in ('ipywidgets', 'anywidget', 'captum', 'IPython'): sys.modules[name] = None
import astroformer_astro.widgets.{module}
from astroformer_astro.widgets.explorer import explorer_view
from astroformer_astro.widgets.parts import require
try: require('ipywidgets', 'widgets')
except ImportError as e: print(e)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert "pip install 'astroformer_astro[widgets]'" in out.stdout, out.stderr


def test_without_ipywidgets_there_is_the_state_and_the_picture(learn, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipywidgets', None)
    bundle = GalaxyExplorer(learn, [0])._repr_mimebundle_()
    assert set(bundle) == {'image/png', 'text/plain'} and "astroformer_astro[widgets]" in bundle['text/plain']


# --- how fast, and how much memory

@pytest.mark.slow
def test_from_choosing_a_galaxy_to_the_new_picture():
    "On two quiet cores: half a second for what is known, two for a fresh saliency of the network that the README shows"
    torch.set_num_threads(2)
    try:
        seed_everything(0)
        learn = astroformer_learner(GalaxyDataLoaders.from_galaxies(galaxies(60, 64), bs=8, augment=None), 'astroformer_pico')
        explorer = GalaxyExplorer(learn, range(40))
        explorer.state.method = 'saliency'
        v = parts(explorer.widget)
        explorer.state.wait()
        def seconds(index):
            began, before = time.perf_counter(), v.upper.value
            explorer.state.index = index
            explorer.state.wait()
            assert v.upper.value != before
            return time.perf_counter() - began
        fresh = [seconds(i) for i in range(1, 10)]
        known = [seconds(i) for i in range(8, -1, -1)]
        print(f'fresh {np.median(fresh):.2f} s, known {np.median(known):.2f} s')
        assert np.median(fresh) <= 2 and np.median(known) <= .5
    finally: torch.set_num_threads(1)


@pytest.mark.slow
def test_five_hundred_changes_leave_no_figure_and_little_memory(learn):
    explorer = GalaxyExplorer(learn, range(30))
    explorer.state.method = 'saliency'
    v, figures = parts(explorer.widget), plt.get_fignums()
    def change(n):
        for k in range(n): explorer.state.set_trait(*[('index', k % 30), ('query', (k % 32, 5)), ('target', classes[k % 3])][k % 3]); explorer.state.wait()
    change(100)                      # caches fill, pools of memory grow
    before = psutil.Process().memory_info().rss
    change(500)
    grown = (psutil.Process().memory_info().rss - before)/2**20
    print(f'{grown:.1f} MiB more after 500 changes')
    assert drawn(v.upper) and grown < 20 and plt.get_fignums() == figures


# --- augmentations and labels

def names(preview): return [ax.get_title().split('\n')[0] for ax in preview.figure().axes]


def test_where_nothing_is_set_the_static_picture_shows_each_augmentation(learn):
    before, *each = [np.asarray(ax.images[0].get_array()) for ax in AugmentPreview(learn).figure().axes]
    assert len(each) == 7 and all(np.abs(image - before).max() > .05 for image in each)


def test_augment_preview_of_flux_and_without_a_scale(tmp_path):
    dls = GalaxyDataLoaders.from_fits(synth_fits(tmp_path, n=80, size=32, seed=0, survey='c'), size=32, progress=False)
    preview = AugmentPreview(dls, strengths={'Seeing.fwhm': 2., 'SkyNoise.sigma': 1., 'Cutout.side': .3})
    assert preview.state.error == '' and preview.state.after.shape == (6, 32, 32, 3) and preview.state.after.std() > 0
    assert preview.state.most('SkyNoise.sigma') < 1, 'in the unit of the flux'
    assert names(AugmentPreview(dls)) == ['before', 'GalaxyAugment', 'Seeing', 'BandGain', 'SkyLevel', 'SkyNoise', 'BandDropout', 'Cutout']
    plain = galaxies()
    plain.catalog = plain.catalog.drop(columns='pxscale')
    scaleless = GalaxyDataLoaders.from_galaxies(plain, bs=8)
    assert 'Seeing' not in names(AugmentPreview(scaleless)) and 'Cutout' in names(AugmentPreview(scaleless))
    view = AugmentPreview(scaleless, strengths={'Seeing.fwhm': 2.}).widget
    assert 'pixel scale' in view.children[2].value and drawn(view.children[3])


def test_relabel_says_what_it_lacks(learn, tmp_path):
    with pytest.raises(GalaxyDataError, match='loaded without galaxies'): Relabel(SimpleNamespace(dls=SimpleNamespace()))
    with pytest.raises(GalaxyDataError, match='cannot be written'): Relabel(learn, '/proc/no/journal.csv').state.decide('round')
    relabel = Relabel(learn, '/proc/no/journal.csv')
    view = relabel.widget
    view.children[2].children[0].click()
    assert 'cannot be written' in view.children[3].value and relabel.state.decisions == {} and relabel.state.index == 0


writer = '''
import sys
from astroformer_astro.widgets.relabel import Journal
journal = Journal(sys.argv[1])
for k in range(100000):
    journal.add(k, 'NGC, "1"', 'spiral', 'round')
    print(k, flush=True)
'''

def test_a_killed_process_loses_no_decision(tmp_path):
    "Kill -9 at an arbitrary moment, three times: every decision that was reported as made is in the journal, and it goes on"
    path, total = tmp_path/'journal.csv', 0
    for wait in (.05, .0, .11):
        process = subprocess.Popen([sys.executable, '-c', writer, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == '0\n'
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        made = 1 + len([l for l in process.stdout.read().splitlines(keepends=True) if l.endswith('\n')])
        process.wait()
        found = Journal(path).read()
        assert len(found) - total in (made, made + 1) and found.row.tolist()[total:] == list(range(len(found) - total))
        total = len(found)


def test_a_line_that_was_broken_off_anywhere_costs_only_itself(tmp_path):
    journal = Journal(tmp_path/'a.csv')
    for k in range(3): journal.add(k, f'galaxy "{k}"', 'spiral', 'rönd')
    text = journal.path.read_bytes()
    for cut in range(len(text.splitlines(keepends=True)[0]), len(text)):
        journal.path.write_bytes(text[:cut])
        again = Journal(journal.path)
        whole = text[:cut].count(b'\n') - 1
        assert len(again.read()) == whole
        again.add(9, 'x', 'y', 'z')
        assert again.read().row.tolist() == [*range(whole), 9]


def test_a_training_of_the_layers_without_statistics_is_noticed():
    "fastai's optimisers change weights in a way that PyTorch does not count"
    learn = astroformer_learner(loaders(), 'astroformer_nano', freeze_norms=True)
    s = ExplorerState(learn, [0])
    s.method = 'saliency'
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    s.update()
    assert s.prediction.probabilities == Explainer(learn).predict(0).probabilities


def test_a_failure_of_what_is_no_longer_wanted_is_not_told():
    begun, told = [], []
    newest = Newest(begun.append)
    def fails(check): yield; raise ValueError('of the first')
    def works(check): yield; return 'the second'
    newest.ask(fails, told.append, told.append)
    next(begun[0])
    newest.ask(works, told.append, told.append)
    for steps in begun:
        for _ in steps: pass
    assert told == ['the second']
