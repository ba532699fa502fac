// On a served page: what the reader chose goes to the server (serving/selections.py) whenever a field was changed.
"use strict";
(() => {
  const form = document.getElementById("whatif-form");
  const code = document.querySelector("#whatif-export code");
  const status = document.getElementById("whatif-kept");
  let kept = 0;

  async function keep() {
    if (!form.checkValidity()) return;
    const { user_selections, calculated_monthly_cost, comparison_delta } = JSON.parse(code.textContent);
    const body = JSON.stringify({ user_selections, calculated_monthly_cost, comparison_delta });
    try {
      const answer = await fetch("selections", { method: "POST", headers: { "Content-Type": "application/json" }, body });
      const said = await answer.json();
      if (!answer.ok) throw new Error(said.error.message);
      kept += 1;
      status.textContent = `Kept on this server: ${kept} ${kept === 1 ? "selection" : "selections"} of yours.`;
    } catch (error) {
      status.textContent = `Not kept: ${error.message}`;
    }
  }

  form.addEventListener("change", () => setTimeout(keep)); // after whatif.js has computed
})();
