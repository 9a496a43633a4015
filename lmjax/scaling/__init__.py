"""Many runs: sweeps, pages that compare runs, transfer of settings, laws of scaling."""
