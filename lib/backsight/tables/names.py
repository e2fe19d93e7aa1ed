"""Names that tables hold: studies write them, figures and claims read them."""

# Families whose inverse speaks for a layer, and whose inverse reads another image's features: the first that is there.
LEADING_FAMILIES = ("modular", "direct", "linear")
SHUFFLED_FAMILIES = ("modular", "linear", "direct")
MAP, EXACT, STEADIED = "map", "exact", "steadied"
NULL_MEAN, NULL_SHUFFLED, NULL_CONSTANT = "null_mean", "null_shuffled", "null_constant"

# 10_tradeoff: inverses, what a change is measured against, the end of a score on hues that say nothing of the class.
FRESH, JOINT, OF_START = "linear", "linear_joint", "linear_of_start"
START, TASK_ONLY = "start", "t = 0"
RANDOM_HUES = "random_hues"

# 11_exact: what became of an image, at half-steps and along whole chains, and which stream a picture is of.
RIGHT = 1e-5  # relative error up to which a stream is back, as exact.inverse has it
BACK, ANOTHER_ROOT, UNSOLVED, ERROR_GROWN = "back", "another_root", "unsolved", "error_grown"
FATES = (BACK, ANOTHER_ROOT, UNSOLVED, ERROR_GROWN)
NEARBY, LOST = "near", "lost"
CHAIN_FATES = (BACK, ANOTHER_ROOT, NEARBY, LOST)
NEAR = 1e-2  # relative error of the first stream: such a picture is the same to the eye
TRUE_STREAM, ONE_TOKEN, ALL_TOKENS, RANDOM_MOVE = "true stream", "one token", "all tokens", "null: random direction"

# Measures that are shares of cases. Where each image is one case, a one or a zero, their interval is Wilson's at least.
SHARES = {
    *("top1", f"top1_{RANDOM_HUES}", "probe_top1", "top1_agreement", "retrieval_top1", "factor_score"),
    *("texture_accuracy", "texture_accuracy_ceiling", "share_keep", "share_revert", "share_grey", "share_other"),
    *("share_nearer", "same_neighbour"),
    *(*FATES, *CHAIN_FATES, *(f"lost_{fate}" for fate in FATES), "tokens_right"),
    *("several_roots", "complete", "negative_determinant"),
}
DIFFERENCES_OF_SHARES = {"reverted_above_deals", "nearer_above_deals"}
