def test_a_truth_value_among_method_options_stays_one() -> None:
    """In a file, and in the settings of a run that is continued."""
    from truestep.pipeline.history import History, continued
    from truestep.settings import parse_settings, table_of

    stage = {
        "kind": "rl", "data": "d", "steps": 1, "method": "super_rl", "prompts_per_step": 2, "samples_per_prompt": 2,
        "tokens_per_microbatch": 64, "optimizer": {"lr": 0.1}, "sampling": {"max_new_tokens": 4},
        "method_options": {"learned_weights": True, "sigma_rate": 0.1},
    }  # fmt: skip
    table = {"name": "x", "model": {"path": "tiny"}, "stages": [stage],
             "data": {"d": {"source": "procedural:addition", "limit": 2}}}  # fmt: skip
    settings = parse_settings(table, where="x")
    for found in (settings, continued(settings, History()), parse_settings(table_of(settings), where="x")):
        assert found.stages[0].method_options["learned_weights"] is True
