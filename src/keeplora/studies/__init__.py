"""Questions asked of models and methods: comparisons, the doctor, principal directions."""
