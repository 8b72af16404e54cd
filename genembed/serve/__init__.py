"""The server: many clients, one decode batch, an answer as soon as a text has halted."""
