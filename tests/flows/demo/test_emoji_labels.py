"""Concepts are code points without variation selector; slugs are names as icon sets write them."""

from flows.demo.emoji_labels import concept_of, flag_concept, slug


def test_concepts_are_code_points_without_variation_selector() -> None:
    assert concept_of("2764-FE0F") == "2764"
    assert concept_of("0023-FE0F-20E3") == concept_of("23-20e3") == "23-20e3"
    assert concept_of("1f3f4-e0067_e0062_e0065_e006e_e0067_e007f") == flag_concept("gb-eng")
    assert flag_concept("fr") == concept_of("1F1EB-1F1F7")
    assert flag_concept("gb-eng") == concept_of("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F")


def test_slugs_are_how_icon_sets_write_names() -> None:
    assert (slug("Côte d'Ivoire"), slug("woman’s hat")) == ("cote-divoire", "womans-hat")
