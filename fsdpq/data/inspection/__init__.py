"""What ``fsdpq data inspect`` counts: facts of rows, totals, lengths, samples, advice."""
