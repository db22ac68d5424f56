"""POST /v1/responses: OpenAI's Responses API, without what it stores."""
