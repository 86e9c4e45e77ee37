"""Parts of the model that are held fixed or trained together, by name."""

PARAMETER_GROUPS = {
    "vision": ["model.vlm_with_expert.vlm.model.vision_model"],
    "connector": ["model.vlm_with_expert.vlm.model.connector"],
    "vlm_text": ["model.vlm_with_expert.vlm.model.text_model", "model.vlm_with_expert.vlm.lm_head"],
    "expert": ["model.vlm_with_expert.lm_expert"],
    "state_proj": ["model.state_proj"],
    "action_proj": [
        "model.action_in_proj",
        "model.action_out_proj",
        "model.action_time_mlp_in",
        "model.action_time_mlp_out",
    ],
    "memory": ["model.memory"],
    "adapters": ["model.adapters"],
}
"""Group → the paths of its modules."""
ENCODER_GROUPS = ("vision", "connector")
VLM_GROUPS = (*ENCODER_GROUPS, "vlm_text")


def group_of(parameter: str) -> str:
    """The group of a parameter, by its name in the policy.

    Raises:
        ValueError: it belongs to none (LeRobot or transformers renamed something).
    """
    for group, modules in PARAMETER_GROUPS.items():
        if any(parameter.startswith(f"{module}.") for module in modules):
            return group
    raise ValueError(f"parameter {parameter} belongs to none of the groups {', '.join(PARAMETER_GROUPS)}")
