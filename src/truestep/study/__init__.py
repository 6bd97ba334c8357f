"""Many runs against each other: arms × seeds, equal data and budgets, intervals over seeds and problems."""
