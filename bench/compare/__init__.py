"""``wam bench --base``: the micro suite of two trees in one run."""
