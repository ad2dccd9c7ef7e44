//! The Loops dialect: `baseten-loops` and whoever speaks like it.

use actix_web::{HttpResponse, web};
use serde_json::{Value, json};

use crate::client::ServiceClient;

/// The routes of this dialect.
pub fn routes(app: &mut web::ServiceConfig) {
    app.route("/v1/loops/capabilities", web::get().to(capabilities));
}

async fn capabilities(client: web::Data<ServiceClient>) -> HttpResponse {
    match client.get_server_capabilities().await {
        Ok(capabilities) => {
            let models: Vec<Value> = capabilities
                .supported_models
                .iter()
                .map(|m| json!({ "model_name": m.model_name, "max_context_length": m.max_context_length }))
                .collect();
            HttpResponse::Ok().json(json!({ "supported_models": models }))
        }
        Err(error) => super::failure(502, "COORDINATOR_UNREACHABLE", &error.to_string()),
    }
}
