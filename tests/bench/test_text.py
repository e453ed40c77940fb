import itertools
import zlib

import pytest
import torch

from gradlr.apps.bench import text


def data(size=1000):
    return torch.randint(256, (size,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def draw(**changes):
    settings = {"batch_size": 3, "length": 16, "steps": 6, "seed": 1, **changes}
    return list(text.batches(data(), **settings))


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_corpora_come_from_disjoint_modules():
    sources = {text.module_name(path) for path in text.module_files(text.SOURCE_HALF)}
    documented = {text.module_name(path) for path in text.module_files(text.DOCUMENTATION_HALF)}
    assert sources and documented
    assert sources.isdisjoint(documented)


def test_half_of_a_module_depends_on_its_name_alone():
    for half in (0, 1):
        assert all(zlib.crc32(text.module_name(path).encode()) % 2 == half for path in text.module_files(half))


def test_files_leave_out_tests_and_installed_packages():
    for path in itertools.chain(text.module_files(0), text.module_files(1)):
        assert not {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(text.library_folder()).parts)


@pytest.mark.parametrize("load", [text.library_sources, text.documentation])
def test_corpus_is_bytes_with_about_a_tenth_held_out(load):
    corpus = load()
    for part in (corpus.train, corpus.validation):
        assert part.dtype == torch.uint8 and part.dim() == 1 and part.device.type == "cpu"
    total = corpus.train.numel() + corpus.validation.numel()
    assert total > 400_000
    assert 0.08 < corpus.validation.numel() / total < 0.2
    assert load() is corpus


@pytest.mark.slow
def test_corpus_is_deterministic():
    again = text.documentation.__wrapped__()
    assert torch.equal(again.train, text.documentation().train)
    assert torch.equal(again.validation, text.documentation().validation)


def test_docstrings_are_cut_from_sources_and_kept_in_documentation():
    long = "Long enough " * 10
    source = f'"""Module.\n\n{long}"""\nx = 1\n\n\ndef f():\n    """Short."""\n    return x\n'
    tree = text._parse(source)
    assert text._without_docstrings(source, tree) == "x = 1\n\n\ndef f():\n    return x\n"
    assert text._docstrings(source, tree) == f"Module.\n\n{long}"


def test_cutting_docstrings_survives_form_feeds():
    source = 'x = 1\n\x0c\ndef f():\n    """Gone."""\n    return 2\n'
    assert text._without_docstrings(source, text._parse(source)) == "x = 1\n\x0c\ndef f():\n    return 2\n"


@pytest.mark.parametrize("folder", ["", "missing"])
def test_too_little_text_names_the_folder(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(text, "library_folder", lambda: tmp_path / folder)
    with pytest.raises(text.TextNotFoundError, match=str(tmp_path)):
        text.library_sources.__wrapped__()


def test_batches_have_the_promised_shape_and_shifted_targets():
    drawn = draw()
    assert len(drawn) == 6
    for inputs, targets in drawn:
        assert inputs.shape == targets.shape == (3, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_starting_later_equals_skipping(start):
    resumed = draw(start=start)
    assert len(resumed) == 6 - start
    assert all(equal(a, b) for a, b in zip(resumed, draw()[start:], strict=True))


def test_batches_differ_between_steps_and_seeds():
    first, second, *_ = draw()
    assert not equal(first, second)
    assert not equal(first, draw(seed=2)[0])
    assert not equal(second, draw(seed=2)[0])


def test_batches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    draw()
    assert torch.equal(before, torch.get_rng_state())


def test_the_shortest_text_gives_its_only_window():
    tiny = data(17)
    ((inputs, targets),) = text.batches(tiny, batch_size=1, length=16, steps=1, seed=0)
    assert torch.equal(inputs[0], tiny[:-1].long()) and torch.equal(targets[0], tiny[1:].long())


@pytest.mark.parametrize("bad", [data(16), data(100).view(2, 50)])
def test_text_without_a_whole_window_is_refused(bad):
    with pytest.raises(ValueError, match="1-D text"):
        text.batches(bad, batch_size=1, length=16, steps=1, seed=0)
    with pytest.raises(ValueError, match="1-D text"):
        text.validation_batches(bad, batch_size=1, length=16, count=1)


def test_validation_batches_are_fixed_and_reach_both_ends():
    drawn = list(text.validation_batches(data(), batch_size=3, length=16, count=4))
    again = list(text.validation_batches(data(), batch_size=3, length=16, count=4))
    assert len(drawn) == 4
    assert all(equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert torch.equal(drawn[0][0][0], data()[:16].long())
    assert torch.equal(drawn[-1][1][-1], data()[-16:].long())
    assert all(torch.equal(inputs[:, 1:], targets[:, :-1]) for inputs, targets in drawn)
