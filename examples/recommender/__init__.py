"""The second demo: two towers recommend films, trained with and without the correction of in-batch negatives."""
