import re

import pytest

import ssprop_fx
from ssprop_fx import bar, constant, cosine, join, linear, warmup
from ssprop_fx.scheduling.parse import CONTROLLERS, EXAMPLES, parse_controller, parse_schedule


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", constant(0.0)),
        ("constant:rate=0.5", constant(0.5)),
        ("bar:rate=0.8,period=2ep", bar(0.8, period=200)),
        ("bar:rate=0.8,period=2ep,dense_fraction=0.25", bar(0.8, 200, 0.25)),
        ("bar: rate = 0.8 , period = 30 ", bar(0.8, period=30)),
        ("linear:start=0,end=0.8,steps=0.5ep", linear(0.0, 0.8, steps=50)),
        ("cosine:end=0.8,start=0.2,steps=10ep", cosine(0.2, 0.8, steps=1000)),
        (
            "none until 1ep then constant:rate=0.8 until 250  then none",
            join([constant(0.0), constant(0.8), constant(0.0)], [100, 250]),
        ),
    ],
)
def test_text_gives_the_schedule_that_it_names(text, expected):
    assert parse_schedule(text, steps_per_epoch=100) == expected


@pytest.mark.parametrize("text", EXAMPLES.values())
def test_every_example_is_right(text):
    parse_schedule(text, steps_per_epoch=100)


@pytest.mark.parametrize("text", CONTROLLERS.values())
def test_every_example_of_a_controller_is_right(text):
    name = type(parse_controller(text)).__name__
    assert name.lower() == text.partition(":")[0].replace("_", "")
    assert name in ssprop_fx.__all__


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"none"}))
def test_a_text_names_public_functions(name):
    schedule = parse_schedule(EXAMPLES[name], steps_per_epoch=100)
    assert name in ssprop_fx.__all__
    assert repr(schedule).startswith(f"{name}(")


def test_warmup_epochs_come_first():
    schedule = parse_schedule("constant:rate=0.5", steps_per_epoch=10, warmup_epochs=2)
    assert schedule == warmup(constant(0.5), steps=20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("barr:rate=0.8,period=2ep", "did you mean bar:rate=0.8,period=2ep"),
        ("", "known: none, constant, linear, cosine, bar"),
        ("0.8", "known: none, constant, linear, cosine, bar"),
        ("none:rate=0.5", "none takes no settings"),
        ("bar:rate=0.8", "bar needs period=; right would be bar:rate=0.8,period=2ep"),
        ("bar", "bar needs rate= and period="),
        ("bar:rate=0.8,period=2ep,speed=3", "bar has rate, period, dense_fraction, not 'speed'"),
        ("bar:rate=0.8,period", "period needs a value"),
        ("bar:rate=0.8,period=2ep,", "not ''"),
        ("bar:rate=0.8,rate=0.7,period=2ep", "rate is given twice"),
        ("bar:rate=0.8,period=2.5", "period must be a whole number of steps"),
        ("bar:rate=0.8,period=twoep", "got 'twoep'"),
        ("bar:rate=0.8,period=infep", "got 'infep'"),
        ("bar:rate=0.8,period=0", "period must be at least 1, got 0"),
        ("bar:rate=80,period=2ep", "rate must be in [0, 1), got 80.0"),
        ("constant:rate=nan", "rate must be in [0, 1)"),
        ("constant:rate=half", "rate must be a number, got 'half'"),
        ("none until half then none", "invalid literal for int() with base 10: 'half'"),
        ("none until 2ep then none until 1ep then none", "boundaries must increase"),
    ],
)
def test_wrong_text_gives_one_line_that_says_what_is_right(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parse_schedule(text, steps_per_epoch=100)
    assert str(caught.value).startswith(f"{text}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bar:rate=0.8,period=2ep", "period=2ep is in epochs, but steps per epoch are not known"),
        ("bar:rate=0.8,period=two", "period must be a whole number of steps, got 'two'"),
        ("bar:rate=0.8", "right would be bar:rate=0.8,period=2000"),
        ("linea", "did you mean linear:start=0,end=0.8,steps=10000"),
    ],
)
def test_where_the_length_of_an_epoch_is_not_known_lengths_are_steps(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_schedule(text)
