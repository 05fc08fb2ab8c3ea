import numpy as np

from experiments.text import corpus


def test_a_text_of_known_characters_comes_back():
    text = "for i in range(3):\n    print(~i)  # down\n"
    np.testing.assert_array_equal(corpus.encode("\n ~"), [0, 1, 95])
    assert corpus.decode(corpus.encode(text)) == text
    assert corpus.decode(corpus.encode("a\té")) == "a??"


def test_every_character_of_a_program_has_the_tag_of_its_token():
    source = 'if a > 12:\n    b = "x" # why\n'
    tags = [corpus.TAGS[tag] for tag in corpus.tags(source)]
    found = {
        tag: "".join(c for c, its in zip(source, tags, strict=True) if its == tag) for tag in tags
    }
    assert found == {
        "keyword": "if",
        "space": "   \n       \n",
        "name": "ab",
        "operator": ">:=",
        "number": "12",
        "string": '"x"',
        "comment": "# why",
    }


def test_a_string_over_several_lines_is_one():
    tags = corpus.tags('x = """a\nb"""\n')
    assert {corpus.TAGS[tag] for tag in tags[4:-1]} == {"string"}
    assert corpus.TAGS[tags[0]] == "name"


def test_the_reference_asks_for_the_next_character():
    text = corpus.language_reference()
    np.testing.assert_array_equal(text.ids[1:], text.labels[:-1])
    assert text.ids.max() < corpus.VOCABULARY
    training, held_out = text.split()
    assert len(training.ids) + len(held_out.ids) == len(text.ids)
    windows = held_out.windows(50)
    assert windows.ids.shape == windows.labels.shape == (len(held_out.ids) // 50, 50)


def test_the_source_has_every_tag():
    text = corpus.python_source()
    assert len(text.ids) == len(text.labels)
    assert set(np.unique(text.labels)) == set(range(len(corpus.TAGS)))


def test_sentences_are_prose_and_there_once():
    sentences = corpus.sentences()
    assert len(sentences) == len(set(sentences)) > 500
    for sentence in sentences:
        assert sentence == sentence.strip()
        assert sentence.endswith(".")
        assert 5 <= len(sentence.split()) <= 40
        assert not set(sentence) & set("\n*|=")
