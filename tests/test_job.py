"""One tiny run from scratch and one fine-tuned from it: what they say, what they write, what they leave alone."""
import json, random, re, shlex, shutil, subprocess, sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pandas as pd, pytest, torch
from fastcore.script import anno_parser
from PIL import Image

from astroformer_astro.cli import main
from astroformer_astro.core import galaxy10_classes, seed_everything
from astroformer_astro.data.block import GalaxyDataLoaders
from astroformer_astro.job import Job, _loss, seconds_per_epoch
from astroformer_astro.learner import astroformer_learner
from astroformer_astro.models.checkpoint import load_astroformer, read_card
from astroformer_astro.synth import synth_arrays, synth_galaxy10


@pytest.fixture(scope='module')
def survey(tmp_path_factory): return synth_galaxy10(tmp_path_factory.mktemp('survey')/'old.h5', n=80, size=64, seed=0, balance='uniform')


@pytest.fixture(scope='module')
def scratch(survey, tmp_path_factory):
    "A folder with a network that has seen two epochs"
    out = tmp_path_factory.mktemp('runs')/'scratch'
    assert main(['train', '--data', str(survey), '--epochs', '2', '--out', str(out)]) == 0
    return out


@pytest.fixture(scope='module')
def catalogue(tmp_path_factory):
    "A table of 40 galaxies of two classes; two of the files are missing, and one row has no class"
    folder = tmp_path_factory.mktemp('catalogue')
    sim = synth_arrays(n=40, size=64, seed=1, balance='uniform')
    for k, img in enumerate(sim['images']):
        if k not in (3, 11): Image.fromarray(img).save(folder/f'{k}.png')
    kinds = ['late' if 'Spiral' in galaxy10_classes[a] else 'early' for a in sim['ans']]
    kinds[20] = None
    pd.DataFrame(dict(name=[f'{k}.png' for k in range(40)], kind=kinds)).to_csv(folder/'new.csv', index=False)
    return folder/'new.csv'


@pytest.fixture(scope='module')
def tuned(scratch, catalogue, tmp_path_factory):
    "The same network after one epoch on the catalogue; and what was printed"
    out = tmp_path_factory.mktemp('runs')/'tuned'
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr('builtins.print', lambda *words, **_: said.append(' '.join(map(str, words))))
        assert main(['train', *options(catalogue, scratch), '--classes', 'late,early', '--epochs', '1', '--recipe', 'finetune freeze_steps=3', '--out', str(out)]) == 0
    return out, '\n'.join(said)


def options(catalogue, scratch): return ['--catalog', str(catalogue), '--x', 'name', '--y', 'kind', '--bad', 'skip', '--pretrained', str(scratch/'galaxies.safetensors')]
def page(out): return unescape((out/'report.html').read_text())
def numbers(out): return json.loads((out/'metrics.json').read_text())


def test_a_report_says_how_it_was_made(scratch, survey):
    text = page(scratch)
    for words in ('Galaxies of old.h5, classified by astroformer_nano', 'Trained from scratch', 'How this was made', '0 for weights, order and augmentation, 42 for the split', 'arcsec apart on one side',
                  'times as much as one of', 'Calibrated (', 'before calibration', 'sets that hold the true class', 'torch 2', '2 epochs', 'completeness (95 % interval)', 'always answering the commonest class gives accuracy'):
        assert words in text, words
    assert not re.search(r'alt="(figure)?"', text)
    command = shlex.split(re.search(r'<th>command</th><td>(.*?)</td>', text)[1])
    again = vars(anno_parser(Job).parse_args(command[2:]))
    assert Job(**{k: v for k, v in again.items() if k not in ('pdb', 'xtra')}) == Job(out=scratch, data=survey, epochs=2, arch='astroformer_nano')


def test_intervals_are_95_per_cent_and_named_so(scratch):
    result = numbers(scratch)
    row = result['classes']['Merging Galaxies']
    assert {k for k in row if k.startswith('completeness')} == {'completeness', 'completeness_95_low', 'completeness_95_high'}
    assert result['held_out']['commonest_balanced_accuracy'] == pytest.approx(.1)
    assert [set(e) for e in result['epochs']] == [{'training_loss', 'held_out_loss', 'accuracy', 'balanced_accuracy'}]*2


def test_both_stages_of_fine_tuning_are_kept(tuned):
    out, said = tuned
    assert len(numbers(out)['epochs']) == 3 + 1
    assert '3 epochs of the head alone, then 1 epoch of all layers, 29 galaxies in each' in said
    assert 'the head alone, epoch 3/3' in said and 'all layers, epoch 1/1' in said and '1 epochs' not in said + page(out)


def test_a_report_says_what_was_fine_tuned(tuned, scratch):
    out, text = tuned[0], page(tuned[0])
    assert 'classified by astroformer_nano, fine-tuned from galaxies.safetensors' in text
    assert f'Fine-tuned from {scratch}/galaxies.safetensors: weights of astroformer_nano, trained on' in text and 'old.h5' in text and 'Merging Galaxies' in text
    assert 'no positions are known' in text and '3 epochs of the head alone, then 1 epoch of all layers' in text


def test_the_network_is_that_of_the_weights(tuned, scratch, catalogue, tmp_path, capsys):
    assert json.loads((tuned[0]/'job.json').read_text())['arch'] == 'astroformer_nano'
    assert main(['train', *options(catalogue, scratch), '--arch', 'astroformer_pico', '--out', str(tmp_path/'no')]) == 2
    said = capsys.readouterr().err
    assert 'are of astroformer_nano, not of astroformer_pico' in said and said.count('\n') == 1 and not (tmp_path/'no').exists()


def test_rows_left_out_are_listed(tuned, catalogue):
    out, said = tuned
    listed = pd.read_csv(out/'skipped.csv')
    assert listed.row.tolist() == [3, 11, 20] and listed.problem[2] == 'no label' and listed.problem[:2].str.endswith('does not exist').all()
    sentence = f'3 rows of {catalogue} could not be used; {out}/skipped.csv lists them'
    assert sentence in said and sentence in page(out)


def test_classes_in_the_order_given(tuned, scratch, catalogue, tmp_path, capsys):
    assert read_card(tuned[0]/'galaxies')['classes'] == ['late', 'early']
    assert main(['train', *options(catalogue, scratch), '--classes', 'late,oval', '--out', str(tmp_path)]) == 2
    assert "its class 'early' is not among those given" in capsys.readouterr().err


@pytest.mark.parametrize('card, found', [('[1, 2]', "'list'"), ('{"format": "astroformer_astro 1"}', "'cfg'"), ('nothing', 'JSON'), (dict(layout='CCCX'), 'CCCX')])
def test_a_card_that_is_no_card(scratch, catalogue, tmp_path, capsys, card, found):
    for f in scratch.glob('galaxies.*'): shutil.copy(f, tmp_path)
    if isinstance(card, dict):
        whole = read_card(tmp_path/'galaxies')
        card = json.dumps(whole | dict(cfg=whole['cfg'] | card))
    (tmp_path/'galaxies.json').write_text(card)
    for words in (['train', *options(catalogue, tmp_path), '--out', str(tmp_path/'no')], ['predict', str(tmp_path/'galaxies'), str(catalogue), str(tmp_path/'no.csv')]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert found in said and said.count('\n') == 1 and not list(tmp_path.glob('no*'))


def test_timing_does_not_change_the_run(survey):
    def weights(timed):
        seed_everything(0)
        learn = astroformer_learner(GalaxyDataLoaders.from_hdf5(survey, bs=32, progress=False), 'astroformer_nano')
        if timed:
            before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
            assert 0 < seconds_per_epoch(learn, batches=1) < 600
            assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return learn.model.state_dict()
    timed, plain = weights(True), weights(False)
    assert all(torch.equal(timed[k], plain[k]) for k in plain)


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_hands_its_options_on():
    names = dict(DATA='data', CATALOG='catalog', IMAGES='images', FILE='x', LABEL='y', CLASSES='classes', BAD='bad', ARCH='arch', SIZE='size', EPOCHS='epochs', PRETRAINED='pretrained', SEED='seed')
    done = subprocess.run(['make', '-n', 'demo', *[f'{k}=a {v}' for k, v in names.items()]], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    for v in names.values(): assert f'--{v} "a {v}"' in done.stdout


def told_of_loss(*weights):
    loss = SimpleNamespace(weight=torch.tensor(weights), label_smoothing=.1)
    return _loss(SimpleNamespace(loss_func=loss, dls=SimpleNamespace(vocab=['elliptical', 'spiral'])))


def test_classes_of_equal_number_are_not_weighed_against_each_other():
    assert 'spiral counts 1.5 times as much as one of elliptical' in told_of_loss(1., 1.5)
    for alike in (1., 1.), (1., 1.04): assert 'all classes count alike' in told_of_loss(*alike) and 'times as much' not in told_of_loss(*alike) and 'rare' not in told_of_loss(*alike)


def test_a_killed_run_goes_on_where_it_was(survey, tmp_path):
    words = [sys.executable, '-m', 'astroformer_astro.cli', 'train', '--data', survey, '--epochs', '4', '--out']
    whole = subprocess.run([*words, tmp_path/'whole'], capture_output=True, text=True, check=True).stdout
    p = subprocess.Popen([*words, tmp_path/'killed'], stdout=subprocess.PIPE, text=True)
    for line in p.stdout:
        if 'epoch 2/4' in line: p.kill(); break
    p.wait()
    again = subprocess.run([*words, tmp_path/'killed', '--resume'], capture_output=True, text=True, check=True).stdout
    assert 'going on with epoch' in again and 'epoch 1/4' not in again and 'epoch 4/4' in again
    a, b = (load_astroformer(tmp_path/d/'galaxies').state_dict() for d in ('whole', 'killed'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    curves = [json.loads((tmp_path/d/'metrics.json').read_text())['epochs'] for d in ('whole', 'killed')]
    assert curves[0] == curves[1] and not (tmp_path/'killed'/'checkpoint').exists()
