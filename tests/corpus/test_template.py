import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.template import parse_template, render_row
from pipeline.corpus.values import column_texts
from pipeline.errors import CorpusError

names = st.text(st.characters(blacklist_characters=".[]{}!:", blacklist_categories=("Cs",)), min_size=1)
texts = st.text(st.characters(blacklist_categories=("Cs",)))


@given(st.lists(st.tuples(texts, names)), texts, st.data())
def test_a_template_renders_as_str_format_does(pieces: list[tuple[str, str]], end: str, data: st.DataObject) -> None:
    escaped = [literal.replace("{", "{{").replace("}", "}}") for literal, _ in pieces] + [
        end.replace("{", "{{").replace("}", "}}")
    ]
    template = (
        "".join(f"{literal}{{{name}}}" for literal, (_, name) in zip(escaped, pieces, strict=False)) + escaped[-1]
    )
    values = {name: data.draw(texts) for _, name in pieces}
    plain = "".join(literal + values[name] for literal, name in pieces) + end
    parsed = parse_template(template, "task 'x', input")
    assert render_row(parsed, values) == plain
    assert set(parsed.columns) == set(values)
    if not any(name.isdigit() for name in values):  # a number is a position to str.format
        assert template.format(**values) == plain


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{}", "{a!r}", "{a:>9}", "{a:{b}}", "{a", "a}", "{a}{"])
def test_anything_but_a_plain_column_name_is_refused_in_one_sentence(template: str) -> None:
    with pytest.raises(CorpusError, match=r"^task 'x', input: the template ") as refused:
        parse_template(template, "task 'x', input")
    assert "\n" not in str(refused.value)


def test_values_are_text_as_they_are_and_numbers_as_str_with_null_and_nan_missing() -> None:
    assert column_texts(pa.array(["a ", "", None])) == ["a ", "", None]
    assert column_texts(pa.array(["a", None, "a"]).dictionary_encode()) == ["a", None, "a"]
    assert column_texts(pa.array([1, None, -3])) == ["1", None, "-3"]
    assert column_texts(pa.array([1.0, float("nan")], from_pandas=False)) == ["1.0", None]
    assert column_texts(pa.array([True, None])) == ["True", None]
    assert column_texts(pa.nulls(2)) == [None, None]
