"""What a PDF says as a whole and a page alone does not: layers, forms. Text layers of many scripts."""

import numpy as np
import pymupdf
import pytest

from pipelines.config import MediaConfig
from pipelines.media.documents import extract_page, page_texts, plain_letters, render_page
from pipelines.sources.passages import choose_passages

BACKENDS = [MediaConfig(document_backend="pymupdf"), MediaConfig(document_backend="pypdfium2")]
BLUE, GREEN, RED = (0, 0, 1), (0, 1, 0), (1, 0, 0)
BOXES = {"left": (20, 20, 120, 120), "middle": (150, 20, 250, 120), "right": (280, 20, 380, 120)}


def layered() -> bytes:
    """Two pages. Shown are only the middle box of the first page, and the left box of the second."""
    with pymupdf.open() as document:
        first, second = (document.new_page(width=400, height=200) for _ in range(2))
        hidden, shown = document.add_ocg("hidden", on=False), document.add_ocg("shown", on=True)
        both, other = document.set_ocmd(ocgs=[hidden, shown], policy="AllOn"), document.set_ocmd(ve=["not", hidden])
        first = document[0]
        first.draw_rect(BOXES["left"], fill=BLUE, color=None, oc=hidden)
        first.draw_rect(BOXES["middle"], fill=RED, color=None, oc=shown)
        first.draw_rect(BOXES["right"], fill=GREEN, color=None, oc=both)
        second = document[1]
        second.draw_rect(BOXES["left"], fill=BLUE, color=None, oc=other)
        second.draw_rect(BOXES["middle"], fill=RED, color=None, oc=hidden)
        return bytes(document.tobytes())


def form(with_appearances: bool = True) -> bytes:
    """Three pages with a filled field each. Without appearances, the viewer has to draw the values."""
    with pymupdf.open() as document:
        for number in range(3):
            page = document.new_page(width=400, height=200)
            page.insert_text((20, 30), f"page {number}")
            field = pymupdf.Widget()
            field.field_type, field.field_name = pymupdf.PDF_WIDGET_TYPE_TEXT, f"name {number}"
            field.field_value, field.text_fontsize = f"VALUE{number}", 20
            field.rect = pymupdf.Rect(50, 50, 250, 90)
            page.add_widget(field)
        if not with_appearances:
            for xref in range(1, document.xref_length()):
                if document.xref_get_key(xref, "Subtype")[1] == "/Widget":
                    document.xref_set_key(xref, "AP", "null")
            document.xref_set_key(document.pdf_catalog(), "AcroForm/NeedAppearances", "true")
        return bytes(document.tobytes())


def named(expression: list, groups: list[int]) -> list:
    """Replace the numbers of layers by their references."""
    operator, *parts = expression
    return [operator, *(named(part, groups) if isinstance(part, list) else groups[part] for part in parts)]


def colors(pixels: np.ndarray) -> list[list[int]]:
    """Colors in the middle of each box."""
    scale = pixels.shape[1] / 400
    return [pixels[round(70 * scale), round((left + 50) * scale)].tolist() for left, *_ in BOXES.values()]


@pytest.mark.parametrize("config", BACKENDS, ids=lambda config: config.document_backend)
class TestPages:
    def test_hidden_layers_stay_hidden(self, config):
        white, data = [255] * 3, layered()
        for page, expected in enumerate([[white, [255, 0, 0], white], [[0, 0, 255], white, white]]):
            assert colors(render_page(data, page, config)) == expected
            assert colors(render_page(extract_page(data, page, config), 0, config)) == expected

    def test_text_of_hidden_layers_is_no_text_of_the_page(self, config):
        """pdftotext 22.12 gives the shown text only."""
        with pymupdf.open() as document:
            document.new_page(width=400, height=200)
            hidden, shown = document.add_ocg("hidden", on=False), document.add_ocg("shown", on=True)
            document[0].insert_text((20, 50), "a hidden layer", oc=hidden)
            document[0].insert_text((20, 100), "a shown layer", oc=shown)
            document[0].insert_text((20, 110), "behind", oc=shown)
            document[0].draw_rect((10, 102, 390, 130), fill=(0, 0, 0))
            document[0].insert_text((20, 120), "white", color=(1, 1, 1), oc=shown)
            document[0].insert_text((20, 140), "ocr", render_mode=3, oc=shown)
            document[0].insert_text((20, 150), "and no layer")
            data = bytes(document.tobytes())
        for source in (data, extract_page(data, 0, config)):
            [text] = page_texts(source, config)
            assert text.split() == ["a", "shown", "layer", "behind", "white", "ocr", "and", "no", "layer"]

    @pytest.mark.parametrize("states", [(False, False), (False, True), (True, True)])
    def test_conditions_of_layers_are_those_of_the_standard(self, config, states):
        """ISO 32000-1, table 99."""
        policies = {"AnyOn": any(states), "AllOn": all(states), "AnyOff": not all(states), "AllOff": not any(states)}
        first, second = states
        expressions = [(["not", 0], not first), (["and", 0, ["not", 1]], first and not second)]
        expected = [*policies.values(), *(value for _, value in expressions)]
        with pymupdf.open() as document:
            document.new_page(width=600, height=100)
            groups = [document.add_ocg(f"layer {number}", on=state) for number, state in enumerate(states)]
            memberships = [document.set_ocmd(ocgs=groups, policy=policy) for policy in policies]
            memberships += [document.set_ocmd(ve=named(expression, groups)) for expression, _ in expressions]
            for place, membership in enumerate(memberships):
                box = (100 * place, 0, 100 * place + 90, 90)
                document[0].draw_rect(box, fill=RED, color=None, oc=membership)
            data = bytes(document.tobytes())
        for shown in (data, extract_page(data, 0, config)):
            pixels = render_page(shown, 0, config)
            scale = pixels.shape[1] / 600
            found = [bool(pixels[round(40 * scale), round((100 * place + 40) * scale), 1] == 0) for place in range(6)]
            assert found == expected

    @pytest.mark.parametrize("with_appearances", [True, False])
    def test_values_of_forms_stay_on_their_page(self, config, with_appearances):
        data = form(with_appearances)
        for page in range(3):
            whole, single = render_page(data, page, config), extract_page(data, page, config)
            scale = whole.shape[1] / 400
            field = whole[round(52 * scale) : round(88 * scale), round(52 * scale) : round(248 * scale)]
            assert (field < 100).all(2).sum() > 1000  # the value is there
            np.testing.assert_array_equal(render_page(single, 0, config), whole)
            assert extract_page(data, page, config) == single
            texts = page_texts(single, config)
            assert len(texts) == 1
            assert texts[0].split()[:3] == ["page", str(page), f"VALUE{page}"]

    def test_a_page_of_a_plain_document_takes_nothing_of_the_others(self, config):
        with pymupdf.open() as document:
            for number in range(20):
                document.new_page().insert_text((50, 50), f"page {number} " * 3)
            data = bytes(document.tobytes())
        single = extract_page(data, 7, config)
        assert [text.split()[:2] for text in page_texts(single, config)] == [["page", "7"]]
        assert len(single) < len(data) / 3

    def test_a_page_of_a_locked_form_can_be_opened_without_a_password(self, config):
        with pymupdf.open(stream=form()) as document:
            data = bytes(document.tobytes(encryption=pymupdf.PDF_ENCRYPT_AES_256, owner_pw="own", user_pw=""))
        single = extract_page(data, 1, config)
        assert not pymupdf.open(stream=single).is_encrypted
        assert "VALUE1" in page_texts(single, config)[0]


def test_a_form_has_no_highlight_of_fields() -> None:
    """Viewers may color fields. The page is compared with pymupdf's, which does not."""
    one, other = (render_page(form(), 0, config).astype(int) for config in BACKENDS)
    assert np.abs(one - other).mean() < 1


def test_presentation_forms_become_letters_and_nothing_else_changes() -> None:
    ligatures = "".join(map(chr, [*range(0xFB00, 0xFB07)]))
    assert plain_letters(ligatures) == "fffiflffifflstst"
    assert plain_letters("\ufb13\ufb4f\ufefb\ufe8e") == "\u0574\u0576\u05d0\u05dc\u0644\u0627\u0627"
    kept = "x² ½ ﹪Ａ ① ℃ e\u0301 \u0958 ﷐".replace("﷐", "")
    assert plain_letters(kept) == kept


@pytest.mark.parametrize(
    ("page", "passage"),
    [
        ("Reliable exami-\nnation of the", "Reliable examination of the"),
        ("eine Über-\nraschung für alle", "eine Überraschung für alle"),
        ("новый объ\u2010\nект наблюдения здесь", "новый объект наблюдения здесь"),
        ("co\u00adop\u00ad\nera\u00adtion between many", "cooperation between many"),
        ("the North-\nSouth divide", "the North- South divide"),
        ("pages 10-\n20 are missing here", "pages 10- 20 are missing here"),
    ],
)
def test_words_divided_between_lines_are_joined(page: str, passage: str) -> None:
    assert choose_passages([page]) == [passage]


@pytest.mark.parametrize(
    "page",
    [
        "यह रिपोर्ट शिक्षा के बारे में है।",
        "এখানে অনেক নদী আছে।",
        "இங்கே பல மொழிகள் உள்ளன.",
        "ఇక్కడ చాలా భాషలు ఉన్నాయి.",
        "ประเทศ ที่ สวยงาม มาก",
        "កម្ពុជា ជា ប្រទេស មួយ",
        "کتاب\u200cهای خوب زیاد است",
        "שָׁלוֹם לְכֻלָּם מִן הַסֵּפֶר",
        "de\u0301ja\u0300 dans l'e\u0301cole",
    ],
)
def test_pages_in_scripts_with_marks_have_words(page: str) -> None:
    assert choose_passages([page]) == [page]


def test_sentences_of_indic_and_arabic_scripts_are_divided() -> None:
    hindi = "भारत एक विशाल देश है और यहाँ कई भाषाएँ बोली जाती हैं।"
    urdu = "یہ ایک بہت بڑا ملک ہے اور یہاں بہت زبانیں ہیں۔"
    assert choose_passages([f"{hindi} है है है है है है है है।"]) == [hindi]
    assert choose_passages([f"{urdu} ہے ہے ہے ہے ہے ہے ہے ہے۔"]) == [urdu]
