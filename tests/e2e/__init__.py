"""The cluster of docker-compose.yml comes up, trains, serves and goes down."""
