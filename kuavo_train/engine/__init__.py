"""What trains the cells of a study: this process, several processes of this machine, or jobs of a cluster."""
