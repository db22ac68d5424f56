{{/* Names, labels and what several workloads share. */}}

{{- define "loraplex.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | replace "." "-" | trunc 35 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" (.Release.Name | replace "." "-") .Chart.Name | trunc 35 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "loraplex.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "loraplex.image" -}}
{{- $i := .root.Values.image -}}
{{- with $i.registry }}{{ . }}/{{ end }}{{ $i.prefix }}{{ .image }}:{{ $i.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "loraplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "loraplex.name" .) }}
{{- else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{/* A number as services read it: of 1000000 Helm makes 1e+06. */}}
{{- define "loraplex.number" -}}
{{- if and (kindIs "float64" .) (eq (float64 (int64 .)) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}

{{/* Refuses a section that is null: Helm takes its defaults away, too. */}}
{{- define "loraplex.checkNulls" -}}
{{- range $path := list "image" "model" "model.hub" "credentials" "credentials.secrets" "credentials.certManager" "valkey" "valkey.external"
    "valkey.podDisruptionBudget" "gateway" "gateway.certificate" "gateway.service" "gateway.podDisruptionBudget" "gateway.pod" "store"
    "store.podDisruptionBudget" "store.pod" "engineDefaults" "engineDefaults.autoscaling" "engineDefaults.podDisruptionBudget"
    "engineDefaults.pod" "keda" "networkPolicies" "networkPolicies.clients" "networkPolicies.admins" "networkPolicies.egress" "networkPolicies.egressPorts"
    "networkPolicies.collectors" "monitoring" "monitoring.rules" "monitoring.dashboards" "monitoring.dashboards.labels" "tracing"
    "inferencePool" "inferencePool.endpointPicker" "serviceAccount" }}
{{- $state := dict "at" $.Values }}
{{- range $word := splitList "." $path }}
{{- if or (not (hasKey $state.at $word)) (kindIs "invalid" (index $state.at $word)) }}{{ fail (printf "%s is null: leave it out to keep its defaults" $path) }}{{ end }}
{{- $_ := set $state "at" (index $state.at $word) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Refuses options that the rest of the chart relies on, and labels that select pods. Takes path, options and pod. */}}
{{- define "loraplex.checkOwn" -}}
{{- $path := .path }}
{{- range list "host" "port" "http-port" "metrics-port" "advertise" "model" "redis-url" "redis-password" "store-target" "device" "tensor-parallel" }}
{{- if hasKey (default dict $.options) . }}{{ fail (printf "%s.options.%s is the chart's own: services, probes and network policies rely on it" $path .) }}{{ end }}
{{- end }}
{{- range list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "loraplex/engines" }}
{{- if hasKey (default dict $.pod.labels) . }}{{ fail (printf "%s.pod.labels has %s, by which the chart selects pods: choose another label" $path .) }}{{ end }}
{{- end }}
{{- end }}

{{/* Refuses values that contradict each other, with what to do. */}}
{{- define "loraplex.check" -}}
{{- include "loraplex.checkNulls" . }}
{{- include "loraplex.checkOwn" (dict "path" "gateway" "options" .Values.gateway.options "pod" .Values.gateway.pod) }}
{{- include "loraplex.checkOwn" (dict "path" "store" "options" .Values.store.options "pod" .Values.store.pod) }}
{{- if eq (int .Values.gateway.service.grpcPort) (int .Values.gateway.service.httpPort) }}
{{- fail "gateway.service.grpcPort and gateway.service.httpPort are equal: a service has each port once" }}{{ end }}
{{- if eq .Values.credentials.mode "secrets" }}
{{- range list "gateway" "engine" "store" }}
{{- if not (index $.Values.credentials.secrets .) }}{{ fail (printf "credentials.secrets.%s is empty: name the secret of that part's credentials" .) }}{{ end }}
{{- end }}
{{- end }}
{{- with .Values.tracing.endpoint }}
{{- if gt (int (regexFind "[0-9]+$" .)) 65535 }}{{ fail (printf "tracing.endpoint %s has a port beyond 65535" .) }}{{ end }}
{{- end }}
{{- if and .Values.model.volume .Values.model.hub.repo }}{{ fail "model.volume and model.hub.repo are both set: keep one" }}{{ end }}
{{- if not (or .Values.model.volume .Values.model.hub.repo) }}{{ fail "no base model: set model.volume and model.path, or model.hub.repo" }}{{ end }}
{{- if and .Values.model.volume (not .Values.model.path) }}{{ fail "model.path is empty: set it to the model's folder in model.volume" }}{{ end }}
{{- if and .Values.model.hub.repo (not (regexMatch "@[0-9a-f]{40}$" .Values.model.hub.repo)) }}
{{- fail (printf "model.hub.repo %s names no commit: write ORG/NAME@COMMIT, so that all pods read the same weights" .Values.model.hub.repo) }}{{ end }}
{{- if and .Values.valkey.enabled .Values.valkey.external.host }}{{ fail "valkey.enabled and valkey.external.host are both set: keep one" }}{{ end }}
{{- if not (or .Values.valkey.enabled .Values.valkey.external.host) }}{{ fail "no Valkey: set valkey.external.host, or valkey.enabled" }}{{ end }}
{{- if and (eq .Values.credentials.mode "certManager") (not .Values.credentials.certManager.issuerName) }}
{{- fail "credentials.certManager.issuerName is empty: name the issuer of the parts' certificates" }}{{ end }}
{{- if and (ne .Values.credentials.mode "secrets") .Values.valkey.enabled (not .Values.valkey.passwordsSecret) }}
{{- fail "valkey.passwordsSecret is empty: Valkey of this chart takes nobody without a password" }}{{ end }}
{{- if and .Values.gateway.requireClientCertificates (not .Values.gateway.tlsSecret) }}
{{- fail "gateway.requireClientCertificates needs gateway.tlsSecret" }}{{ end }}
{{- if and .Values.gateway.certificate.issuerName (not .Values.gateway.tlsSecret) }}
{{- fail "gateway.certificate.issuerName is set and gateway.tlsSecret is empty: name the secret that cert-manager is to keep" }}{{ end }}
{{- if and .Values.gateway.certificate.issuerName (not .Values.gateway.certificate.dnsNames) }}
{{- fail "gateway.certificate.dnsNames is empty: name what clients dial" }}{{ end }}
{{- end }}

{{- define "loraplex.modelDir" -}}
{{- if .Values.model.hub.repo }}/models/{{ .Values.model.hub.repo | splitList "@" | first | base }}
{{- else }}/models/{{ .Values.model.path }}{{ end }}
{{- end }}

{{- define "loraplex.valkeyUrl" -}}
{{- $v := .root.Values.valkey -}}
{{- if $v.enabled -}}
{{- $scheme := ternary "redis" "rediss" (eq .root.Values.credentials.mode "mesh") -}}
{{ $scheme }}://{{ .user }}@{{ include "loraplex.name" .root }}-valkey:6379/0
{{- else -}}
{{ ternary "rediss" "redis" $v.external.tls }}://{{ .user }}@{{ $v.external.host }}:{{ $v.external.port }}/0
{{- end -}}
{{- end }}

{{/* Environment of a part: model, Valkey, credentials. Takes root, part (gateway, engine, store), var (its prefix), user. */}}
{{- define "loraplex.env" -}}
{{- $root := .root -}}
{{- $mode := $root.Values.credentials.mode -}}
- {name: {{ .var }}_MODEL, value: {{ include "loraplex.modelDir" $root }}}
{{- with $root.Values.model.name }}
- {name: {{ $.var }}_SERVED_MODEL_NAME, value: {{ . | quote }}}
{{- end }}
{{- with $root.Values.model.aliases }}
- {name: {{ $.var }}_MODEL_ALIAS, value: {{ join "," . | quote }}}
{{- end }}
{{- if $root.Values.model.textOnly }}
- {name: {{ .var }}_TEXT_ONLY, value: "true"}
{{- end }}
- {name: {{ .var }}_LOG_FORMAT, value: json}
{{- with $root.Values.tracing.endpoint }}
- {name: {{ $.var }}_OTLP_ENDPOINT, value: {{ . | quote }}}
- {name: {{ $.var }}_TRACE_SAMPLE_RATIO, value: {{ $root.Values.tracing.sampleRatio | quote }}}
{{- end }}
- {name: {{ .var }}_REDIS_URL, value: {{ include "loraplex.valkeyUrl" . | quote }}}
{{- if eq $mode "secrets" }}
- {name: {{ .var }}_REDIS_PASSWORD_FILE, value: /credentials/valkey-password}
{{- else if $root.Values.valkey.passwordsSecret }}
- {name: {{ .var }}_REDIS_PASSWORD_FILE, value: /valkey-password/password}
{{- end }}
{{- if ne $mode "mesh" }}
{{- if hasPrefix "rediss:" (include "loraplex.valkeyUrl" .) }}
- {name: {{ .var }}_REDIS_TLS_CA, value: /credentials/ca.crt}
{{- end }}
- {name: {{ .var }}_PEER_TLS_CERT, value: /credentials/tls.crt}
- {name: {{ .var }}_PEER_TLS_KEY, value: /credentials/tls.key}
{{- if ne .part "store" }}
- {name: {{ .var }}_PEER_TLS_CA, value: /credentials/ca.crt}
- {name: {{ .var }}_STORE_TLS_NAME, value: adapter-store.loraplex.internal}
{{- if eq $mode "secrets" }}
- {name: {{ .var }}_PEER_API_KEY_FILE, value: /credentials/api-key}
{{- end }}
{{- end }}
{{- if ne .part "gateway" }}
- {name: {{ .var }}_API_KEYS_FILE, value: {{ ternary "/credentials/api-keys" "/peers/api-keys" (eq $mode "secrets") }}}
- {name: {{ .var }}_TLS_CERT, value: /credentials/tls.crt}
- {name: {{ .var }}_TLS_KEY, value: /credentials/tls.key}
- {name: {{ .var }}_TLS_CLIENT_CA, value: /credentials/ca.crt}
- {name: LORAPLEX_HEALTHCHECK_TLS_CA, value: /credentials/ca.crt}
- {name: LORAPLEX_HEALTHCHECK_TLS_CERT, value: /credentials/tls.crt}
- {name: LORAPLEX_HEALTHCHECK_TLS_KEY, value: /credentials/tls.key}
- {name: LORAPLEX_HEALTHCHECK_TLS_NAME, value: {{ ternary "engine" "adapter-store" (eq .part "engine") }}.loraplex.internal}
{{- end }}
{{- else if ne .part "gateway" }}
- {name: {{ .var }}_ALLOW_ANONYMOUS, value: "true"}
{{- end }}
{{- if ne .part "store" }}
- {name: {{ .var }}_STORE_TARGET, value: "{{ include "loraplex.name" $root }}-store:8510"}
{{- end }}
{{- with $root.Values.monitoring.keySecret }}
- {name: {{ $.var }}_METRICS_KEY_FILE, value: /metrics-key/key}
{{- end }}
{{- with $root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Volumes of a part, and where they are mounted. */}}
{{- define "loraplex.volumes" -}}
{{- $mode := .root.Values.credentials.mode -}}
- name: models
{{- if .root.Values.model.hub.repo }}
  emptyDir: {sizeLimit: {{ .root.Values.model.hub.size }}}
{{- else }}
{{ toYaml .root.Values.model.volume | indent 2 }}
{{- end }}
- {name: cache, emptyDir: {}}
- {name: tmp, emptyDir: {}}
{{- if eq $mode "secrets" }}
- {name: credentials, secret: {secretName: {{ index .root.Values.credentials.secrets .part }}, defaultMode: 0440}}
{{- else if eq $mode "certManager" }}
- {name: credentials, secret: {secretName: {{ include "loraplex.name" .root }}-{{ .part }}-tls, defaultMode: 0440}}
- {name: peers, configMap: {name: {{ include "loraplex.name" .root }}-peers}}
{{- end }}
{{- if and (ne $mode "secrets") .root.Values.valkey.passwordsSecret }}
- name: valkey-password
  secret:
    secretName: {{ .root.Values.valkey.passwordsSecret }}
    defaultMode: 0440
    items: [{key: valkey-{{ .part }}, path: password}]
{{- end }}
{{- with .root.Values.monitoring.keySecret }}
- {name: metrics-key, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with .pod.volumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "loraplex.mounts" -}}
{{- $mode := .root.Values.credentials.mode -}}
- {name: models, mountPath: /models, readOnly: true}
- {name: cache, mountPath: /home/loraplex/.cache}
- {name: tmp, mountPath: /tmp}
{{- if ne $mode "mesh" }}
- {name: credentials, mountPath: /credentials, readOnly: true}
{{- end }}
{{- if eq $mode "certManager" }}
- {name: peers, mountPath: /peers, readOnly: true}
{{- end }}
{{- if and (ne $mode "secrets") .root.Values.valkey.passwordsSecret }}
- {name: valkey-password, mountPath: /valkey-password, readOnly: true}
{{- end }}
{{- if .root.Values.monitoring.keySecret }}
- {name: metrics-key, mountPath: /metrics-key, readOnly: true}
{{- end }}
{{- with .pod.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The container that fetches a model of the hub before a part starts. */}}
{{- define "loraplex.fetchModel" -}}
{{- with .Values.model.hub.repo }}
initContainers:
  - name: fetch-model
    image: {{ include "loraplex.image" (dict "root" $ "image" "tools") }}
    imagePullPolicy: {{ $.Values.image.pullPolicy }}
    args: [fetch-model, {{ . | quote }}, --out, {{ include "loraplex.modelDir" $ }}]
    env:
      {{- with $.Values.model.hub.endpoint }}
      - {name: HF_ENDPOINT, value: {{ . | quote }}}
      {{- end }}
      {{- with $.Values.model.hub.tokenSecret }}
      - {name: HF_TOKEN, valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}}
      {{- end }}
      - {name: HF_HOME, value: /tmp/hub}
    securityContext: {{ include "loraplex.containerSecurity" $ | nindent 6 }}
    volumeMounts:
      - {name: models, mountPath: /models}
      - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}

{{- define "loraplex.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "loraplex.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Where the pods of a part run. */}}
{{- define "loraplex.placement" -}}
{{- with .pod.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- if .pod.topologySpreadConstraints }}
{{ toYaml .pod.topologySpreadConstraints | indent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: {matchLabels: {{ include "loraplex.selector" . | fromYaml | toJson }}}
{{- end }}
{{- end }}

{{/* A probe of gRPC's health service: the kubelet's own where there is no TLS, which it cannot speak. */}}
{{- define "loraplex.probe" -}}
{{- if .tls }}
exec: {command: [python, -m, loraplex_common.healthcheck, "127.0.0.1:{{ .port }}", {{ .service | quote }}]}
timeoutSeconds: 5
{{- else }}
grpc: {port: {{ .port }}, service: {{ .service | quote }}}
timeoutSeconds: 3
{{- end }}
{{- end }}

{{/* Further options of a part, on the command line: there a service refuses what it does not know. */}}
{{- define "loraplex.args" -}}
{{- range $option, $value := .options }}
{{- if kindIs "bool" $value }}
- --{{ ternary "" "no-" $value }}{{ $option }}
{{- else if kindIs "slice" $value }}
{{- range $value }}
- {{ printf "--%s=%s" $option (include "loraplex.number" .) | quote }}
{{- end }}
{{- else }}
- {{ printf "--%s=%s" $option (include "loraplex.number" $value) | quote }}
{{- end }}
{{- end }}
{{- end }}
