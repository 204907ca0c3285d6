def test_a_unit_that_raises_is_a_failure_and_the_others_go_on():
    pass
