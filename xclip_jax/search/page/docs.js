// Shows the API's description. Scripts inside the page are forbidden by its content security policy.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null });
