"""`eureka report`: a run, or two, as one HTML file that needs no network, no server and no build step."""
