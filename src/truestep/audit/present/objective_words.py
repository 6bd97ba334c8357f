"""Sentences about what a step computes instead of a mean over all tokens, and about what it depends on."""

OBJECTIVES: dict[str, str] = {
    "label_smoothing": "labels are smoothed by {epsilon:.3g}",
    "z_loss": "a z-loss is added (weight {weight:.3g})",
    "z_loss_everywhere": "a z-loss is added at all positions (weight {weight:.3g})",
    "entropy": "the entropy of the predictions is added (weight {weight:.3g})",
    "entropy_everywhere": "the entropy of the predictions is added at all positions (weight {weight:.3g})",
    "logits_squared": "the squared logits are added (weight {weight:.3g})",
    "logits_squared_everywhere": "the squared logits are added at all positions (weight {weight:.3g})",
    "focal": "focal loss (exponent {gamma:.3g})",
    "focal_weights": "every token is weighted by its error to the power of {gamma:.3g}, as in a focal loss, without "
    "a gradient of the weight",
    "dft": "every token is weighted by its own probability (DFT)",
    "token_weights": "tokens have different weights ({least:.3g} to {most:.3g})",
    # relations between cases
    "differs_by_split": "the update of the same rows depends on how they are split into micro-batches (by {share:.1%})",
    "differs_by_order": "the update of the same rows depends on their order (by {share:.1%})",
    "differs_by_padding": "the update of the same rows depends on their padding (by {share:.1%})",
    "random": "the step is random: the same rows give another update when they are run again (by {share:.1%})",
}  # fmt: skip
