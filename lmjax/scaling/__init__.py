"""Many runs: sweeps over settings, and pages that compare runs."""
