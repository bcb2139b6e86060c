"""What other libraries need to work with stiefelopt, one module each; imported by nobody else."""
