"""The paper's tables and figures from evaluations, and the training of its ablations; nothing else imports this."""
