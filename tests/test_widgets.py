"The Explorer: its state without widgets, the widgets tied to it, and what is left where neither a kernel nor ipywidgets is"
import base64, subprocess, sys
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from matplotlib import pyplot as plt
from astroformer_astro.core import GalaxyDataError, seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.data.images import GalaxySet
from astroformer_astro.interpret.attention import AttentionMaps
from astroformer_astro.interpret.attribution import Attribution, Explainer, Prediction
from astroformer_astro.learner import astroformer_learner
from astroformer_astro.synth import synth_arrays
from astroformer_astro.widgets.explorer import GalaxyExplorer, explanation_figure, explorer_view
from astroformer_astro.widgets.state import Answers, ExplorerState

torch.set_num_threads(1)
PNG = b'\x89PNG'


def drawn(image): return bytes(image.value).startswith(PNG)


@pytest.fixture(scope='module')
def learn():
    seed_everything(0)
    images = synth_arrays(30, 32, balance='uniform')['images']
    galaxies = GalaxySet(images, pd.DataFrame(dict(label=['round', 'spiral', 'other']*10)), ('round', 'spiral', 'other'))
    return astroformer_learner(GalaxyDataLoaders.from_galaxies(galaxies, bs=8, augment=None, valid_pct=.4), 'astroformer_nano')


@pytest.fixture
def state(learn):
    "Saliency, which takes one step, keeps these tests quick"
    s = ExplorerState(Explainer(learn), [0, 1, 2, 3, 4])
    s.method = 'saliency'
    return s


class Told:
    "An explainer whose answers are known and counted"
    def __init__(self, truths=('a', 'b', 'b'), called='a'):
        self.learn = SimpleNamespace(model=torch.nn.Linear(1, 1), dls=SimpleNamespace(vocab=('a', 'b'), catalog=pd.DataFrame(dict(label=list(truths)))))
        self.called, self.asked = called, []
    def predict(self, item): self.asked.append(('predict', item)); return Prediction(np.zeros((4, 4, 3)), {'a': .6, 'b': .4}, 'a')
    def attribute(self, item, *how):
        self.asked.append(('attribute', item, *how))
        if item == 1: raise ZeroDivisionError('a fault of ours')
        return Attribution(np.zeros((4, 4, 3)), {'a': .6, 'b': .4}, 'a', values=np.full((3, 4, 4), float(item)), target='a', method='saliency')
    def attention(self, item): self.asked.append(('attention', item)); return AttentionMaps([np.full((2, 4, 4), .25)], [(2, 2)], (4, 4))


def test_answers_follow_choices():
    told = Told()
    s = ExplorerState(told, [0, 2])
    assert s.attribution.values.max() == 0
    s.next()
    assert s.attribution.values.max() == 2 and s.index == 1
    s.next()
    assert s.index == 1, 'the last one stays'
    s.target, s.baseline = 'b', 'black'
    assert told.asked[-1] == ('attribute', 2, 'integrated_gradients', 'b', 'black')


def test_answers_are_kept_and_bounded():
    told = Told()
    answers = Answers(told, [0, 2], keep=2)
    answers('predict', 0), answers('predict', 0)
    assert len(told.asked) == 1
    answers('predict', 1), answers('attention', 1), answers('predict', 0)
    assert len(told.asked) == 4, 'the oldest was pushed out'


def test_answers_are_forgotten_when_the_weights_change():
    told = Told()
    s = ExplorerState(told, [0])
    n = len(told.asked)
    s.update()
    assert len(told.asked) == n
    with torch.no_grad(): told.learn.model.weight += 1
    s.update()
    assert len(told.asked) == 2*n
    told.learn.model.load_state_dict(torch.nn.Linear(1, 1).state_dict())
    s.update()
    assert len(told.asked) == 3*n


def test_a_failure_takes_away_only_its_own_answer():
    s = ExplorerState(Told(), [0, 1])
    s.next()
    assert s.attribution is None and s.prediction is not None and s.attention is not None
    assert s.error == 'ZeroDivisionError: a fault of ours' and not s.busy
    s.previous()
    assert s.attribution is not None and s.error == ''


def test_busy_frames_the_answers():
    s, seen = ExplorerState(Told(), [0, 2]), []
    s.observe(lambda c: seen.append((c['new'], s.attribution.values.max())), 'busy')
    s.next()
    assert seen == [(True, 0), (False, 2)], 'one drawing a change, and never of a mixture'


def test_filters(state, learn):
    labels = learn.dls.catalog.label
    for name in ('round', 'spiral', 'other'):
        state.filter = name
        assert [labels[state.answers.items[i]] for i in state.shown] == [name]*len(state.shown)
        assert state.prediction.truth == name and state.index == 0
    state.filter = 'wrong'
    right = [i for i in range(5) if i not in state.shown]
    state.filter = 'all'
    for i in range(5):
        state.index = i
        assert (state.prediction.predicted == state.prediction.truth) == (i in right)


@pytest.mark.parametrize('choice, found', [(dict(filter='odd'), "no filter 'odd'"), (dict(index=99), 'no galaxy 99'), (dict(method='x'), "no method 'x'"), (dict(baseline='x'), "no baseline 'x'"),
                                           (dict(target='x'), "no class 'x'"), (dict(block=7), 'no block 7'), (dict(head=7), 'no head 7'), (dict(query=(99, 0)), 'outside the image')])
def test_every_wrong_choice_is_said_and_mended(state, choice, found):
    (name, value), = choice.items()
    before = getattr(state, name)
    setattr(state, name, value)
    assert found in state.error and 'Error' not in state.error
    setattr(state, name, before)
    assert state.error == '' and None not in (state.prediction, state.attribution, state.attention)


def test_items_that_cannot_be_read_or_are_none(learn):
    s = ExplorerState(Explainer(learn), ['missing.png', 0])
    assert s.error == 'missing.png does not exist' and s.attribution is None
    s.next()
    assert s.error == '' and s.attribution is not None
    assert 'no galaxy passes' in ExplorerState(Explainer(learn), []).error


def test_a_network_without_attention_is_still_explained(learn):
    plain = torch.nn.Sequential(torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(12, 3))
    s = ExplorerState(Explainer(SimpleNamespace(model=plain, dls=learn.dls)), [0])
    assert s.attribution.delta < .01 and 'no attention to look at' in s.error
    view = explorer_view(s)
    assert drawn(view.children[3]) and view.children[5].value == b'' and 'no attention' in view.children[2].value


def parts(view):
    choices, steps, line, upper, attention, lower = view.children
    return SimpleNamespace(choices=choices.children, slider=steps.children[0], back=steps.children[1], on=steps.children[2], line=line, upper=upper, lower=lower, attention=attention.children)


def test_widgets_are_tied_to_the_state(state):
    v = parts(explorer_view(state))
    first = v.upper.value, v.lower.value
    assert drawn(v.upper) and drawn(v.lower)
    v.slider.value = 2
    assert state.index == 2 and v.upper.value != first[0] and v.lower.value != first[1]
    v.back.click(); v.back.click()
    assert v.slider.value == 0 and (v.upper.value, v.lower.value) == first
    v.attention[2].value = 0
    assert state.query[0] == 0 and v.upper.value == first[0] and v.lower.value != first[1]
    v.choices[2].value = 'other'
    assert state.target == 'other' and v.upper.value != first[0]
    state.target = None
    assert v.choices[2].label == 'as predicted'


def test_filter_keeps_slider_and_state_together(state):
    v = parts(explorer_view(state))
    v.slider.value = 4
    v.choices[0].value = 'spiral'
    assert (v.slider.value, v.slider.max, state.index) == (0, len(state.shown) - 1, 0)
    v.choices[0].value = 'all'
    assert v.slider.max == 4


def test_errors_are_on_the_screen_and_nothing_stale_is(state, monkeypatch):
    v = parts(explorer_view(state))
    state.index = 99
    assert 'there is no galaxy 99' in v.line.value and (v.upper.value, v.lower.value, v.upper.layout.display) == (b'', b'', 'none')
    state.index = 0
    monkeypatch.setattr('astroformer_astro.widgets.explorer.plot_explanation', lambda *a, **k: 1/0)
    v.on.click()
    assert 'ZeroDivisionError' in v.line.value and v.upper.value == b'' and drawn(v.lower)


def test_controls_come_with_the_first_galaxy_that_has_attention(learn):
    s = ExplorerState(Explainer(learn), ['<b>.png', 0])
    v = explorer_view(s)
    assert parts(v).attention == () and '&lt;b&gt;.png does not exist' in parts(v).line.value
    s.next()
    assert len(parts(v).attention) == 4 and drawn(parts(v).lower)


def test_static_picture(learn, tmp_path):
    explorer = GalaxyExplorer(learn, [0, 1])
    bundle = explorer._repr_mimebundle_()
    assert base64.b64decode(bundle['image/png']).startswith(PNG) and 'application/vnd.jupyter.widget-view+json' in bundle
    assert explorer.show().axes, 'the figure, outside a notebook'
    explorer.save(tmp_path/'now.png')
    assert (tmp_path/'now.png').read_bytes().startswith(PNG)
    with pytest.raises(GalaxyDataError, match='cannot be written'): explorer.save('/proc/no/now.png')
    explorer.state.index = 99
    assert 'no galaxy 99' in explanation_figure(explorer.state).texts[0].get_text()


def test_no_figure_is_left_open(state):
    before = plt.get_fignums()
    explorer_view(state)
    for i in range(3): state.index = i
    assert plt.get_fignums() == before


def test_import_needs_neither_ipywidgets_nor_captum():
    code = '''
import sys
sys.modules['ipywidgets'] = sys.modules['captum'] = sys.modules['IPython'] = None
from astroformer_astro.widgets.explorer import *
from astroformer_astro.interpret.attribution import integrated_gradients
for f, n in (explorer_view, 1), (integrated_gradients, 4):
    try: f(*[None]*n)
    except ImportError as e: print(e)
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert "pip install 'astroformer_astro[widgets]'" in out.stdout and "pip install 'astroformer_astro[interpret]'" in out.stdout, out.stderr
