from tests.models_page import COMMAND, PAGE, page


def test_the_page_of_models_is_what_the_tests_have():
    assert PAGE.read_text() == page(), f"write it again: {COMMAND}"
